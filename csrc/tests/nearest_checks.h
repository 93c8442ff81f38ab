// Exact lists by every product that this CPU runs: the best of all scores, equal ones by id, for awkward sizes and keys.
#pragma once
#include <limits>
#include <numeric>

#include "check.h"
#include "nearest.h"
#include "thread_pool.h"

namespace rag::test {

inline std::vector<int32_t> best_of_all(const Rows& keys, const std::vector<float>& queries,
                                        const std::vector<int64_t>& visible, int64_t k) {
    std::vector<int32_t> lists(visible.size() * k, -1), ids(keys.n);
    std::vector<float> scores(keys.n);
    for (size_t q = 0; q < visible.size(); ++q) {
        std::iota(ids.begin(), ids.end(), 0);
        keys.score(&queries[q * keys.width()], ids.data(), keys.n, scores.data());
        std::stable_sort(ids.begin(), ids.begin() + visible[q], [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
        std::copy_n(ids.begin(), std::min(k, visible[q]), &lists[q * k]);
    }
    return lists;
}

inline void nearest_lists_are_the_best(Kind kind, int64_t n, int64_t dim, int64_t count, int64_t k, Dtype dtype) {
    Typed keys(make_keys(kind, n, dim, 7), n, dim, dtype);
    const std::vector<float> extra = make_keys(Kind::random, n, 1, 8);
    if (count % 2) keys.rows.extra = extra.data();
    const std::vector<float> queries = make_keys(kind, count, keys.rows.width(), 9);
    std::vector<int64_t> visible(count);
    for (int64_t q = 0; q < count; ++q) visible[q] = q % 5 == 4 ? 0 : n - q * 7 % n;
    const std::vector<int32_t> expected = best_of_all(keys.rows, queries, visible, k);
    for (const TileKernel& kernel : tile_kernels()) {
        std::vector<int32_t> lists(count * k);
        nearest_keys(keys.rows, queries.data(), visible.data(), count, k, kernel, lists.data());
        CHECK(lists == expected);
    }
}

// Threads that each look up some of the queries find what one finds.
inline void nearest_lists_of_threads(ThreadPool& pool) {
    const int64_t n = 200, dim = 64, count = 90, k = 6, some = 15;
    Typed keys(make_keys(Kind::random, n, dim, 7), n, dim, Dtype::float32);
    const std::vector<float> queries = make_keys(Kind::random, count, dim, 9);
    const std::vector<int64_t> visible(count, n);
    const std::vector<int32_t> expected = best_of_all(keys.rows, queries, visible, k);
    for (const TileKernel& kernel : tile_kernels()) {
        std::vector<int32_t> lists(count * k);
        pool.parallel_for(count / some, 1, [&](int64_t i) {
            const int64_t first = i * some;
            nearest_keys(keys.rows, &queries[first * dim], &visible[first], some, k, kernel, &lists[first * k]);
        });
        CHECK(lists == expected);
    }
}

inline void check_nearest(ThreadPool& pool) {
    nearest_lists_of_threads(pool);
    for (Kind kind : kKinds)
        for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16})
            for (auto [n, dim] : {std::pair<int64_t, int64_t>{1, 1}, {2, 17}, {63, 64}, {600, 33}})
                for (int64_t count : {1, 33, 64})
                    for (int64_t k : {1, 3, 80}) nearest_lists_are_the_best(kind, n, dim, count, k, dtype);
    nearest_keys({nullptr, Dtype::float32, 0, 8, 8, nullptr}, nullptr, nullptr, 0, 4, tile_kernels().front(), nullptr);
}

}  // namespace rag::test
