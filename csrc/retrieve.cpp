#include "retrieve.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <limits>
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

// Of tasks, the dearest first: those of bin b are order[begins[b]] .. order[begins[b + 1] - 1], each in the bin that had
// the least to do before it.
void deal(const std::vector<Task>& tasks, int64_t bins, std::vector<Task>& order, std::vector<int64_t>& begins) {
    std::vector<int64_t> loads(bins, 0), bin_of(tasks.size());
    for (size_t i = 0; i < tasks.size(); ++i) {
        bin_of[i] = std::min_element(loads.begin(), loads.end()) - loads.begin();
        loads[bin_of[i]] += tasks[i].cost + tasks[i].end - tasks[i].begin;
    }
    order.clear(), begins.assign(1, 0);
    for (int64_t b = 0; b < bins; ++b) {
        for (size_t i = 0; i < tasks.size(); ++i)
            if (bin_of[i] == b) order.push_back(tasks[i]);
        begins.push_back(order.size());
    }
}

bool there(const float* numbers, int64_t count) {
    const auto* bits = reinterpret_cast<const volatile uint32_t*>(numbers);
    for (int64_t i = count; i-- > 0;)
        if (bits[i] == kAbsent) return false;
    return true;
}

// Waits for posted numbers, on behalf of all threads of a retrieval.
class Arrivals {
   public:
    bool late() const { return late_.load(std::memory_order_relaxed); }
    // False once one has waited too long.
    bool await(const float* numbers, int64_t count, std::chrono::nanoseconds& waited) {
        if (there(numbers, count)) return !late();
        const auto begin = std::chrono::steady_clock::now();
        while (!late()) {
            for (int i = 0; i < 16; ++i)
                if (ThreadPool::pause(), there(numbers, count)) {
                    waited += std::chrono::steady_clock::now() - begin;
                    return true;
                }
            if (std::chrono::steady_clock::now() - begin > kPatience) late_ = true;
        }
        return false;
    }

   private:
    std::atomic<bool> late_{false};
};

struct One {
    int64_t row, head;
};

}  // namespace

int64_t retrieve(const std::vector<const IndexedRow*>& rows, const Asked& asked, const Retrieved& out, ThreadPool& pool,
                 int64_t* waited) {
    thread_local std::vector<std::atomic<int64_t>> kept;
    thread_local std::vector<Task> cut_into, dealt;
    thread_local std::vector<int64_t> begins;
    if (kept.size() < rows.size()) kept = std::vector<std::atomic<int64_t>>(rows.size());
    // The names of thread_local vectors are others in every thread.
    std::atomic<int64_t>* const searches_left = kept.data();
    const int64_t count = rows.size(), group = asked.group, k = asked.k, width = group * k;
    if (!count || !group) return 0;
    const int64_t numbers = rows[0]->graph.keys.width(), ef = std::max(asked.ef, k);
    cut(count, group, pool.size(), out.keys_scored, cut_into);
    for (int64_t r = 0; r < count; ++r) searches_left[r].store(group, std::memory_order_relaxed);
    std::atomic<int64_t> total{0}, least_waited{std::numeric_limits<int64_t>::max()};
    Arrivals arrivals;

    // All searches of some tasks: as far as they go for what is foreseen, then to the end. False where something is late.
    const auto run = [&](const Task* tasks, int64_t many) {
        thread_local std::vector<One> ones;
        ones.clear();
        for (const Task* task = tasks; task < tasks + many; ++task)
            for (int64_t head = task->begin; head < task->end; ++head) ones.push_back({task->row, head});
        const int64_t all = ones.size();
        if (!all) return;
        std::deque<BeamSearch>& searches = searches_of_thread(all);
        std::chrono::nanoseconds idle{0};
        const auto each_in_turns = [&](const float* of, int64_t beam, bool anew) {
            for (int64_t first = 0; first < all; first += kTurns) {
                std::array<BeamSearch*, kTurns> going;
                const int64_t turns = std::min(all - first, kTurns);
                for (int64_t i = 0; i < turns; ++i) {
                    const auto [r, head] = ones[first + i];
                    const float* query = of + (r * group + head) * numbers;
                    if (asked.posted && !arrivals.await(query, numbers, idle)) return false;
                    going[i] = &searches[first + i];
                    if (anew)
                        going[i]->start(rows[r]->graph, query, beam,
                                        {asked.near + r * group * asked.near_stride, group, asked.num_near, asked.near_stride},
                                        head);
                    else
                        going[i]->turn_to(query, beam);
                }
                take_turns(going.data(), turns);
            }
            return true;
        };
        if (asked.foreseen && !each_in_turns(asked.foreseen, std::max<int64_t>(asked.foreseen_ef, 1), true)) return;
        if (!each_in_turns(asked.queries, ef, !asked.foreseen)) return;
        int64_t least = least_waited;
        while (idle.count() < least && !least_waited.compare_exchange_weak(least, idle.count())) {
        }
        for (int64_t i = 0; i < all; ++i) {
            const auto [r, head] = ones[i];
            const int64_t at = r * group + head;
            out.keys_scored[at] = searches[i].finish(k, out.ids + at * k, out.scores ? out.scores + at * k : nullptr);
            if (!out.positions || searches_left[r].fetch_sub(1) > 1) continue;
            int32_t* positions = out.positions + r * width;
            const int64_t found = unite(out.ids + r * width, width, rows[r]->first, positions);
            if (out.clusters) look_up(*rows[r], positions, found, width, out.clusters + r * width);
            total += found;
        }
    };
    if (asked.posted) {
        // Every thread has its searches from the start, and goes on with them when their queries arrive.
        deal(cut_into, pool.size(), dealt, begins);
        const Task* const tasks = dealt.data();
        const int64_t* const begin = begins.data();
        pool.parallel_for(pool.size(), 1, [&](int64_t b) { run(tasks + begin[b], begin[b + 1] - begin[b]); });
    } else {
        const Task* const tasks = cut_into.data();
        pool.parallel_for(cut_into.size(), 1, [&](int64_t i) { run(tasks + i, 1); });
    }
    if (waited) *waited = least_waited;
    return arrivals.late() ? kNotArrived : total.load();
}

}  // namespace rag
