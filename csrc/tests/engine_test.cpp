// The native code without Python, for builds with sanitizers: awkward sizes and keys, invariants of every result.
#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "check.h"
#include "graph.h"
#include "graph_insert.h"
#include "graph_search.h"
#include "nearest_checks.h"
#include "pool_checks.h"
#include "retrieve_checks.h"
#include "row_kernels.h"

using namespace rag;
using namespace rag::test;

namespace {

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float16, Dtype::bfloat16, Dtype::int8};

std::vector<int32_t> all_ids(int64_t n) {
    std::vector<int32_t> ids(n);
    std::iota(ids.begin(), ids.end(), 0);
    return ids;
}

void kernels_agree() {
    for (Dtype dtype : kDtypes)
        for (int64_t dim : {1, 3, 63, 64, 65, 96, 128, 200}) {
            const int64_t n = 9;
            Typed keys(make_keys(Kind::random, n, dim, 1), n, dim, dtype);
            const std::vector<float> query = make_keys(Kind::random, 1, dim, 2);
            const std::vector<int32_t> ids = {8, 0, 3, 3, 7, 1, 2};
            for (const RowKernel& kernel : row_kernels()) {
                std::vector<float> scores(ids.size()), row(dim);
                kernel.score[static_cast<int>(dtype)](keys.rows, query.data(), ids.data(), ids.size(), scores.data());
                for (size_t i = 0; i < ids.size(); ++i) {
                    keys.rows.load(ids[i], row.data());
                    double sum = 0, size = 0;
                    for (int64_t d = 0; d < dim; ++d) {
                        sum += static_cast<double>(query[d]) * row[d];
                        size += std::fabs(static_cast<double>(query[d]) * row[d]);
                    }
                    CHECK(std::fabs(scores[i] - sum) <= 1e-6 * size);
                }
            }
        }
}

// Exact lists of float32 queries, causally: query i of every head sees the keys 0..i.
std::vector<int32_t> exact_lists(const Rows& keys, const std::vector<float>& queries, int64_t count, int64_t k) {
    std::vector<int32_t> ids(count * k, -1);
    std::vector<float> scores(count * k, -std::numeric_limits<float>::infinity());
    std::vector<int64_t> visible(count);
    for (int64_t i = 0; i < count; ++i) visible[i] = std::min(i + 1, keys.n);
    extend_lists(keys, queries.data(), visible.data(), count, 0, k, ids.data(), scores.data());
    return ids;
}

void check_graph(const std::vector<int32_t>& links, const std::vector<int32_t>& entries, int64_t n, int64_t degree) {
    std::vector<uint8_t> met(n, 0);
    std::vector<int32_t> queue;
    const auto meet = [&](int32_t y) {
        CHECK(y >= 0 && y < n);
        if (!met[y]) met[y] = 1, queue.push_back(y);
    };
    for (int32_t entry : entries)
        if (entry >= 0) meet(entry);
    for (int64_t x = 0; x < n; ++x) {
        const int32_t* row = &links[x * degree];
        const int64_t filled = std::find(row, row + degree, -1) - row;
        CHECK(std::all_of(row + filled, row + degree, [](int32_t y) { return y == -1; }));
        CHECK(std::find(row, row + filled, x) == row + filled);
        for (int64_t j = 0; j < filled; ++j) CHECK(std::find(row + j + 1, row + filled, row[j]) == row + filled);
    }
    for (size_t head = 0; head < queue.size(); ++head)
        for (int64_t j = 0; j < degree && links[queue[head] * degree + j] >= 0; ++j) meet(links[queue[head] * degree + j]);
    CHECK(static_cast<int64_t>(queue.size()) == n);
}

// Links of all layouts hold the same keys.
std::vector<uint16_t> pack(const std::vector<int32_t>& links, int64_t n, int64_t degree) {
    std::vector<uint16_t> packed(n * degree);
    std::vector<int32_t> back(n * degree);
    pack_links(links.data(), n, degree, 1, degree, packed.data());
    unpack_links({packed.data(), degree, 1}, n, back.data());
    CHECK(back == links);
    std::vector<uint16_t> split(n * (degree + 1));
    std::vector<int32_t> wide(n * (degree + 1));
    pack_links(links.data(), n, degree, 2, degree + 1, split.data());
    unpack_links({split.data(), degree + 1, 2}, n, wide.data());
    for (int64_t x = 0; x < n; ++x) CHECK(std::equal(&links[x * degree], &links[x * degree] + degree, &wide[x * (degree + 1)]));
    return packed;
}

void check_search(const Graph& graph, const Rows& exact, const std::vector<float>& queries, int64_t count) {
    const int64_t n = exact.n, dim = exact.dim;
    for (int64_t k : {int64_t{1}, n, n + 5})
        for (int64_t ef : {int64_t{1}, n}) {
            std::vector<int32_t> ids(count * k);
            std::vector<float> scores(count * k), all(n);
            std::vector<int64_t> scored(count);
            std::vector<int32_t> near(count * 3, -1);  // some start from two keys, one of them an entry or not
            for (int64_t q = 0; q < count; q += 2) near[q * 3] = static_cast<int32_t>(n - 1), near[q * 3 + 1] = 0;
            search_each(graph, queries.data(), count, {near.data(), count, 3, 3}, 0, k, ef, ids.data(), scores.data(), scored.data());
            for (int64_t q = 0; q < count; ++q) {
                exact.score(&queries[q * dim], all_ids(n).data(), n, all.data());
                const int32_t* found = &ids[q * k];
                const int64_t filled = std::find(found, found + k, -1) - found;
                CHECK(filled <= n && scored[q] >= filled && scored[q] <= 2 * n);
                for (int64_t i = 0; i < k; ++i) {
                    if (i >= filled) {
                        CHECK(found[i] == -1 && std::isinf(scores[q * k + i]));
                        continue;
                    }
                    CHECK(scores[q * k + i] == all[found[i]]);
                    CHECK(i == 0 || scores[q * k + i - 1] >= scores[q * k + i]);
                    CHECK(std::find(found, found + i, found[i]) == found + i);
                }
                if (std::max(k, ef) < n) continue;
                std::sort(all.begin(), all.end(), std::greater<>());
                CHECK(filled == std::min(k, n));
                for (int64_t i = 0; i < filled; ++i) CHECK(scores[q * k + i] == all[i]);
            }
        }
}

void graph_of(Kind kind, int64_t n, int64_t dim, int64_t degree, Dtype dtype, bool co_occurrence, ThreadPool& one,
              ThreadPool& many) {
    const int64_t group = 3, k = 6, query_links = degree / 2, num_entries = 4;
    const std::vector<float> floats = make_keys(kind, n, dim, 3);
    Typed keys(floats, n, dim, dtype), copy(floats, n, dim, Dtype::int8);
    const std::vector<float> queries = make_keys(Kind::random, group * n, dim, 4);
    std::vector<int32_t> by_query;
    for (int64_t head = 0; head < group; ++head) {
        const auto begin = queries.begin() + head * n * dim;
        const auto lists = exact_lists(keys.rows, {begin, begin + n * dim}, n, k);
        by_query.insert(by_query.end(), lists.begin(), lists.end());
    }
    const std::vector<int32_t> by_key = exact_lists(keys.rows, floats, n, degree);
    const BuildOptions options{degree, query_links, num_entries, n, co_occurrence};
    std::vector<int32_t> links, entries;
    for (ThreadPool* pool : {&one, &many}) {
        std::vector<int32_t> made(n * degree), starts(num_entries);
        const HeadInput input{keys.rows, {by_query.data(), group * n, k}, {by_key.data(), n, degree}, made.data(), starts.data()};
        const int64_t repaired = build_graphs({input}, options, *pool);
        CHECK(repaired >= 0 && repaired < std::max<int64_t>(n, 1));
        check_graph(made, starts, n, degree);
        CHECK(links.empty() || (made == links && starts == entries));
        links = made, entries = starts;
    }
    const std::vector<uint16_t> packed = pack(links, n, degree);
    const int64_t count = std::min<int64_t>(group * n, 9);  // more than take turns at once
    const Links as_searched{packed.data(), degree, 1};
    check_search({keys.rows, as_searched, entries.data(), num_entries}, keys.rows, queries, count);
    check_search({copy.rows, as_searched, entries.data(), num_entries, keys.rows}, keys.rows, queries, count);

    // All links gone: repair makes a graph of them again.
    std::fill(links.begin(), links.end(), -1);
    CHECK(repair_graphs({{keys.rows, {by_query.data(), group * n, k}, {}, links.data(), entries.data()}}, options, many) >=
          n - num_entries);
    check_graph(links, entries, n, degree);
}

// A graph of the first keys takes up the others, in every layout of links: the same for any number of threads, as it
// should be, and a search with a beam of all keys finds them.
void growth_of(Kind kind, int64_t before, int64_t n, int64_t key_links, int64_t segments, bool co_occurrence,
               bool with_queries, ThreadPool& one, ThreadPool& many) {
    const int64_t group = 3, k = 6, dim = 17, degree = 8, num_entries = 4, fresh = n - before;
    const std::vector<float> floats = make_keys(kind, n, dim, 7);
    Typed keys(floats, n, dim, Dtype::float16);
    Rows first = keys.rows;
    first.n = before;
    const std::vector<float> queries = make_keys(Kind::random, group * n, dim, 8);
    const auto of_head = [&](int64_t head, int64_t from, int64_t to) {
        return std::vector<float>(queries.begin() + (head * n + from) * dim, queries.begin() + (head * n + to) * dim);
    };
    std::vector<int32_t> by_query;
    for (int64_t head = 0; head < group; ++head) {
        const auto lists = exact_lists(first, of_head(head, 0, before), before, k);
        by_query.insert(by_query.end(), lists.begin(), lists.end());
    }
    const std::vector<int32_t> by_key = exact_lists(first, floats, before, key_links ? degree : 1);
    std::vector<int32_t> links(before * degree), entries(num_entries);
    const BuildOptions built{degree, degree - key_links, num_entries, before, co_occurrence};
    const Lists near_old{by_key.data(), before, key_links ? degree : 0};
    build_graphs({{first, {by_query.data(), group * before, k}, near_old, links.data(), entries.data()}}, built, one);
    links.resize(n * degree, -1);

    // The second half of the new queries sees all keys; lists of old keys are all of -1 where nothing was found.
    const int64_t asked = with_queries ? fresh : 0;
    std::vector<float> new_queries;
    std::vector<int32_t> lists;
    std::vector<float> list_scores;
    std::vector<int64_t> visible(asked);
    for (int64_t i = 0; i < asked; ++i) visible[i] = 2 * i < asked ? before + i + 1 : n;
    for (int64_t head = 0; head < group; ++head) {
        const std::vector<float> own = of_head(head, before, before + asked);
        std::vector<int32_t> ids(asked * k, -1);
        std::vector<float> scores(asked * k, -std::numeric_limits<float>::infinity());
        const std::vector<int64_t> old(asked, head == 1 ? 0 : before);
        extend_lists(keys.rows, own.data(), old.data(), asked, 0, k, ids.data(), scores.data());
        new_queries.insert(new_queries.end(), own.begin(), own.end());
        lists.insert(lists.end(), ids.begin(), ids.end());
        list_scores.insert(list_scores.end(), scores.begin(), scores.end());
    }
    const int64_t near_width = key_links ? 5 : 0;
    std::vector<int32_t> near(fresh * near_width, -1);
    for (int64_t i = 0; i < fresh && near_width; ++i)
        for (int64_t j = 0; j < std::min<int64_t>(i % 6, before) && j < near_width; ++j) near[i * near_width + j] = (i + j) % before;
    const std::vector<float> mean(floats.begin(), floats.begin() + dim), reciprocals(n, 1.f);
    std::vector<float> form(dim * dim);
    for (int64_t a = 0; a < dim; ++a)
        for (int64_t b = 0; b < dim; ++b) form[a * dim + b] = a == b ? 2.f : 0.1f;
    const bool metric = before % 2;

    const int64_t slots = segments > 1 ? degree + (segments + 1) / 2 : degree;
    std::vector<int32_t> made, starts;
    for (ThreadPool* pool : {&one, &many}) {
        std::vector<int32_t> own_lists = lists, own_entries = entries, wide(n * slots, -1);
        std::vector<float> own_scores = list_scores;
        std::vector<uint16_t> packed(n * slots);
        for (int64_t i = 0; i < n && !segments; ++i) std::copy_n(&links[i * degree], degree, &wide[i * slots]);
        if (segments) pack_links(links.data(), n, degree, segments, slots, packed.data());
        const Links all{segments ? static_cast<const void*>(packed.data()) : wide.data(), slots, segments};
        const HeadGrowth input{keys.rows, before, new_queries.data(), own_lists.data(), own_scores.data(),
                               {near.data(), fresh, near_width},
                               key_links ? mean.data() : nullptr, key_links && metric ? form.data() : nullptr,
                               key_links ? reciprocals.data() : nullptr, all, own_entries.data()};
        const BuildOptions options{degree, degree - key_links, num_entries, asked, co_occurrence};
        insert_keys({input}, options, group, k, visible.data(), *pool);
        std::vector<int32_t> result(n * slots);
        unpack_links(all, n, result.data());
        check_graph(result, own_entries, n, slots);
        CHECK(made.empty() || (made == result && starts == own_entries));
        made = result, starts = own_entries;
        check_search({keys.rows, all, own_entries.data(), num_entries}, keys.rows, queries, std::min<int64_t>(n, 9));
    }
}

void lifted_keys_are_scored_with_their_extra() {
    const int64_t n = 5, dim = 3;
    Typed keys(make_keys(Kind::random, n, dim, 5), n, dim, Dtype::float32);
    const std::vector<float> extra = {1, 2, 3, 4, 5}, query = {0, 0, 0, 2};
    keys.rows.extra = extra.data();
    std::vector<float> scores(n), row(dim + 1);
    keys.rows.score(query.data(), all_ids(n).data(), n, scores.data());
    keys.rows.load(4, row.data());
    CHECK(row[dim] == 5.f);
    for (int64_t i = 0; i < n; ++i) CHECK(scores[i] == 2.f * extra[i]);
}

void unions() {
    const std::vector<int32_t> ids = {4, -1, 4, 7, 0, 7, -1};
    std::vector<int32_t> out(ids.size());
    CHECK(unite(ids.data(), ids.size(), 10, out.data()) == 3);
    CHECK((out == std::vector<int32_t>{14, 17, 10, -1, -1, -1, -1}));
    CHECK(unite(nullptr, 0, 10, nullptr) == 0);
}

}  // namespace

int main() {
    ThreadPool one(1, false), two(2, false), many(3, false);
    kernels_agree();
    lifted_keys_are_scored_with_their_extra();
    unions();
    for (int threads : {1, 2, 3, 8}) check_pool(threads);
    check_retrieval({&one, &two, &many});
    check_nearest(many);
    for (Kind kind : kKinds)
        for (int64_t n : {1, 2, 63, 200})
            for (int64_t dim : {1, 17, 64})  // degrees grow: searches of one thread keep their buffers
                for (bool co_occurrence : {false, true})
                    graph_of(kind, n, dim, dim == 1 ? 2 : 8 + n / 9, n == 63 ? Dtype::float16 : Dtype::bfloat16,
                             co_occurrence, one, many);
    for (Kind kind : kKinds)
        for (auto [before, n] : {std::pair<int64_t, int64_t>{1, 2}, {1, 64}, {2, 5}, {63, 64}, {97, 160}})
            for (int64_t key_links : {0, 5, 8})
                for (int64_t segments : {0, 1, 3})
                    for (bool co_occurrence : {false, true})
                        growth_of(kind, before, n, key_links, segments, co_occurrence, n != 64, one, many);
    growth_of(Kind::random, 63, 64, 5, 1, true, true, one, many);
    graph_of(Kind::random, 300, 64, 80, Dtype::float32, true, one, many);
    std::printf("native code: all checks held, inner loops");
    for (const RowKernel& kernel : row_kernels()) std::printf(" %s", kernel.name);
    std::printf(", products of tiles");
    for (const TileKernel& kernel : tile_kernels()) std::printf(" %s", kernel.name);
    std::printf("\n");
}
