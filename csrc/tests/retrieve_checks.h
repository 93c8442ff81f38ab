// What `retrieve` gives for many kv heads at once: what searches one by one, their union and a table say.
#pragma once
#include <algorithm>
#include <numeric>

#include "check.h"
#include "retrieve.h"

namespace rag::test {

// Two kv heads of a sequence of n keys, `gap` elements between the rows, with random links among them.
struct TestGraphs {
    static constexpr int64_t kHeads = 2, kDegree = 6, kEntries = 3;
    std::vector<float> floats, extra;
    Typed store, copy;
    std::vector<uint16_t> links;
    std::vector<int32_t> entries, assignment;
    std::vector<IndexedRow> rows;

    TestGraphs(int64_t n, int64_t dim, int64_t gap, bool lifted, bool compact, bool clustered)
        : floats(make_keys(Kind::random, kHeads * n, dim + gap, static_cast<uint32_t>(n))),
          extra(make_keys(Kind::random, kHeads * n, 1, 3)),
          store(floats, kHeads * n, dim + gap, Dtype::bfloat16),
          copy(floats, kHeads * n, dim + gap, Dtype::int8),
          links(kHeads * n * kDegree, 0xffff),
          entries(kHeads * kEntries, -1),
          assignment(kHeads * (n + 2)) {
        std::mt19937 generator(static_cast<uint32_t>(n + dim));
        for (int64_t i = 0; i < kHeads * n; ++i)
            for (int64_t j = 0; j < i % (kDegree + 1); ++j) links[i * kDegree + j] = static_cast<uint16_t>(generator() % n);
        for (int32_t& cluster : assignment) cluster = static_cast<int32_t>(generator() % 50);
        for (int64_t h = 0; h < kHeads; ++h) {
            for (int64_t i = 0; i < std::min(kEntries, n); ++i) entries[h * kEntries + i] = static_cast<int32_t>(n - 1 - i);
            const auto head_of = [&](const Typed& all) {
                Rows keys = all.rows;
                keys.data = static_cast<const char*>(keys.data) + h * n * (dim + gap) * item_bytes(keys.dtype);
                keys.n = n, keys.dim = dim;
                if (keys.scales) keys.scales += h * n;
                if (lifted) keys.extra = &extra[h * n];
                return keys;
            };
            const Graph graph{head_of(compact ? copy : store), {&links[h * n * kDegree], kDegree, 1}, &entries[h * kEntries],
                              kEntries, compact ? head_of(store) : Rows{}};
            rows.push_back({graph, 10 * n, clustered ? &assignment[h * (n + 2)] : nullptr});
        }
    }
    TestGraphs(const TestGraphs&) = delete;
    TestGraphs& operator=(const TestGraphs&) = delete;
};

// Searches queries [count, width()] of one graph, those of the query heads from `own` on, one after the other.
inline void search_each(const Graph& graph, const float* queries, int64_t count, const Starts& starts, int64_t own, int64_t k,
                        int64_t ef, int32_t* ids, float* scores, int64_t* keys_scored) {
    BeamSearch search;
    for (int64_t i = 0; i < count; ++i) {
        search.start(graph, queries + i * graph.keys.width(), std::max(ef, k), starts, own + i);
        while (search.step()) {
        }
        keys_scored[i] = search.finish(k, ids + i * k, scores + i * k);
    }
}

inline void retrieval_is_search_and_union(int64_t group, int64_t dim, int64_t num_near, bool lifted, bool compact,
                                          bool clustered, const std::vector<ThreadPool*>& pools) {
    const int64_t k = 7, ef = 12, near_stride = num_near + 2, width = group * k;
    const TestGraphs one(1, dim, dim, lifted, compact, clustered), few(5, dim, 0, lifted, compact, clustered),
        many(300, dim, dim, lifted, compact, clustered);
    std::vector<const IndexedRow*> rows;
    for (const TestGraphs* graphs : {&many, &one, &few, &many})
        for (const IndexedRow& row : graphs->rows) rows.push_back(&row);
    const int64_t count = rows.size(), wide = dim + lifted;
    const std::vector<float> queries = make_keys(Kind::random, count * group, wide, 2);
    std::vector<int32_t> near(count * group * near_stride, 99999);  // behind the first num_near: nothing that may be read
    for (int64_t i = 0; i < count * group; ++i)
        for (int64_t j = 0; j < num_near; ++j)
            near[i * near_stride + j] = j <= i % 3 ? static_cast<int32_t>((7 * i + j) % rows[i / group]->graph.keys.n) : -1;

    std::vector<int32_t> ids(count * width), positions(count * width), clusters(count * width, -1);
    std::vector<int64_t> scored(count * group);
    int64_t found = 0;
    std::vector<float> scores(width);
    for (int64_t r = 0; r < count; ++r) {
        const Starts starts{&near[r * group * near_stride], group, num_near, near_stride};
        for (int64_t own = 0; own < group; ++own)
            search_each(rows[r]->graph, &queries[(r * group + own) * wide], 1, starts, own, k, ef, &ids[(r * group + own) * k],
                         scores.data(), &scored[r * group + own]);
        found += unite(&ids[r * width], width, rows[r]->first, &positions[r * width]);
        for (int64_t i = r * width; i < (r + 1) * width && clustered; ++i)
            if (positions[i] >= 0) clusters[i] = rows[r]->assignment[positions[i] - rows[r]->first];
    }
    const Asked asked{queries.data(), group, num_near ? near.data() : nullptr, num_near ? near_stride : 0, num_near, k, ef};
    for (ThreadPool* pool : pools) {
        std::vector<int32_t> own_ids(ids.size()), own_positions(ids.size()), own_clusters(ids.size(), -1);
        std::vector<int64_t> own_scored(scored.size());
        const Retrieved out{own_ids.data(), nullptr, own_scored.data(), own_positions.data(),
                            clustered ? own_clusters.data() : nullptr};
        CHECK(retrieve(rows, asked, out, *pool) == found);
        CHECK(own_ids == ids && own_scored == scored && own_positions == positions && own_clusters == clusters);
    }
    // Begun with other vectors: the same for any threads, and with the queries themselves what the searches found above.
    const std::vector<float> others = make_keys(Kind::random, count * group, wide, 9);
    for (const std::vector<float>* foreseen : {&queries, &others}) {
        Asked early = asked;
        early.foreseen = foreseen->data(), early.foreseen_ef = ef;
        std::vector<int32_t> first_ids;
        std::vector<int64_t> first_scored;
        for (ThreadPool* pool : pools) {
            std::vector<int32_t> own_ids(ids.size()), own_positions(ids.size());
            std::vector<int64_t> own_scored(scored.size());
            retrieve(rows, early, {own_ids.data(), nullptr, own_scored.data(), own_positions.data(), nullptr}, *pool);
            if (first_ids.empty()) first_ids = own_ids, first_scored = own_scored;
            CHECK(own_ids == first_ids && own_scored == first_scored);
            CHECK(foreseen != &queries || (own_ids == ids && own_positions == positions));
        }
    }
    const Retrieved nothing{nullptr, nullptr, nullptr, nullptr, nullptr};
    CHECK(retrieve({}, asked, nothing, *pools[0]) == 0);
}

inline void check_retrieval(const std::vector<ThreadPool*>& pools) {
    for (int64_t group : {1, 3, 4, 9})
        for (int64_t dim : {17, 64, 128})
            for (int64_t num_near : {0, 25})
                for (int kind = 0; kind < 8; ++kind)
                    retrieval_is_search_and_union(group, dim, num_near, kind & 1, kind & 2, kind & 4, pools);
}

}  // namespace rag::test
