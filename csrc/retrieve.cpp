#include "retrieve.h"

#include <algorithm>
#include <atomic>
#include <numeric>

namespace rag {
namespace {

// Some searches of one row: the query heads begin..end - 1, done by one thread. In its caches they find what the others of
// the row loaded, and one's wait for memory is another's turn.
struct Task {
    int64_t row, begin, end, cost;
};

// Cuts the rows' searches into tasks, the dearest first, so that all threads end together. `before`: keys that each search
// of the step before scored, which tells what this one will take; heads differ by five times. A task takes no more than a
// thread's share of all, or a single search. Without a step before: pairs, as long as every thread gets one, and more only
// where every thread gets two tasks.
void cut(int64_t rows, int64_t group, int64_t threads, const int64_t* before, std::vector<Task>& tasks) {
    const int64_t searches = rows * group;
    const int64_t all = std::accumulate(before, before + searches, int64_t{0});
    const int64_t some = std::max(searches / (2 * threads), std::min<int64_t>(searches / threads, 2));
    const int64_t most = all ? group : std::clamp<int64_t>(some, 1, group);
    tasks.clear();
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < group; ++i) {
            const int64_t cost = before[r * group + i];
            Task* last = i ? &tasks.back() : nullptr;
            if (last && last->end - last->begin < most && (last->cost + cost) * threads <= all)
                ++last->end, last->cost += cost;
            else
                tasks.push_back({r, i, i + 1, cost});
        }
    }
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
}

void look_up(const IndexedRow& row, const int32_t* positions, int64_t count, int64_t width, int32_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = row.assignment[positions[i] - row.first];
    std::fill(out + count, out + width, -1);
}

}  // namespace

int64_t retrieve(const std::vector<const IndexedRow*>& rows, const Asked& asked, const Retrieved& out, ThreadPool& pool) {
    thread_local std::vector<std::atomic<int64_t>> kept;
    thread_local std::vector<Task> cut_into;
    if (kept.size() < rows.size()) kept = std::vector<std::atomic<int64_t>>(rows.size());
    // The names of thread_local vectors are others in every thread.
    std::atomic<int64_t>* const tasks_left = kept.data();
    const int64_t count = rows.size(), group = asked.group, k = asked.k, width = group * k;
    if (!count || !group) return 0;
    cut(count, group, pool.size(), out.keys_scored, cut_into);
    const Task* const tasks = cut_into.data();
    for (int64_t r = 0; r < count; ++r) tasks_left[r].store(0, std::memory_order_relaxed);
    for (const Task& task : cut_into) tasks_left[task.row].fetch_add(1, std::memory_order_relaxed);
    std::atomic<int64_t> total{0};
    pool.parallel_for(cut_into.size(), 1, [&](int64_t i) {
        const Task& task = tasks[i];
        const int64_t r = task.row, at = r * group + task.begin;
        const IndexedRow& row = *rows[r];
        const Starts starts{asked.near + r * group * asked.near_stride, group, asked.num_near, asked.near_stride};
        search_graph(row.graph, asked.queries + at * row.graph.keys.width(), task.end - task.begin, starts, task.begin, k,
                     asked.ef, out.ids + at * k, out.scores ? out.scores + at * k : nullptr, out.keys_scored + at);
        if (!out.positions || tasks_left[r].fetch_sub(1) > 1) return;
        int32_t* positions = out.positions + r * width;
        const int64_t found = unite(out.ids + r * width, width, row.first, positions);
        if (out.clusters) look_up(row, positions, found, width, out.clusters + r * width);
        total += found;
    });
    return total;
}

}  // namespace rag
