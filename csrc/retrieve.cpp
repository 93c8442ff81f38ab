#include "retrieve.h"

#include <algorithm>
#include <atomic>

namespace rag {
namespace {

// Into how many tasks a row's searches are cut. In one thread they find in its caches what the others of the row loaded, and
// one's wait for memory is another's turn: worth about a quarter of the time for four, half of that for two. Longer tasks end
// further apart, the more so as a row's searches take alike: so pairs, as long as every thread gets one, and more only where
// every thread gets two tasks.
int64_t tasks_of_row(int64_t rows, int64_t group, int64_t threads) {
    const int64_t searches = rows * group;
    const int64_t some = std::max(searches / (2 * threads), std::min<int64_t>(searches / threads, 2));
    const int64_t most = std::clamp<int64_t>(some, 1, group);
    return (group + most - 1) / most;
}

void look_up(const IndexedRow& row, const int32_t* positions, int64_t count, int64_t width, int32_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = row.assignment[positions[i] - row.first];
    std::fill(out + count, out + width, -1);
}

}  // namespace

int64_t retrieve(const std::vector<const IndexedRow*>& rows, const Asked& asked, const Retrieved& out, ThreadPool& pool) {
    thread_local std::vector<std::atomic<int64_t>> kept;
    if (kept.size() < rows.size()) kept = std::vector<std::atomic<int64_t>>(rows.size());
    std::atomic<int64_t>* const tasks_left = kept.data();  // the name `kept` is another vector in every thread
    const int64_t count = rows.size(), group = asked.group, k = asked.k, width = group * k;
    if (!count || !group) return 0;
    const int64_t tasks = tasks_of_row(count, group, pool.size());
    for (int64_t r = 0; r < count; ++r) tasks_left[r].store(tasks, std::memory_order_relaxed);
    std::atomic<int64_t> total{0};
    pool.parallel_for(count * tasks, 1, [&](int64_t task) {
        const int64_t r = task / tasks, part = task % tasks;
        const int64_t begin = group * part / tasks, end = group * (part + 1) / tasks, at = r * group + begin;
        const IndexedRow& row = *rows[r];
        const Starts starts{asked.near + r * group * asked.near_stride, group, asked.num_near, asked.near_stride};
        search_graph(row.graph, asked.queries + at * row.graph.keys.width(), end - begin, starts, begin, k, asked.ef,
                     out.ids + at * k, out.scores ? out.scores + at * k : nullptr, out.keys_scored + at);
        if (!out.positions || tasks_left[r].fetch_sub(1) > 1) return;
        int32_t* positions = out.positions + r * width;
        const int64_t found = unite(out.ids + r * width, width, row.first, positions);
        if (out.clusters) look_up(row, positions, found, width, out.clusters + r * width);
        total += found;
    });
    return total;
}

}  // namespace rag
