#include "retrieve.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <numeric>

namespace rag {
namespace {

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

bool there(const float* numbers, int64_t count) {
    const auto* bits = reinterpret_cast<const volatile uint32_t*>(numbers);
    for (int64_t i = count; i-- > 0;)
        if (bits[i] == kAbsent) return false;
    return true;
}

}  // namespace

bool Arrivals::await(const float* numbers, int64_t count, std::chrono::nanoseconds& waited) {
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

Retrieval::Retrieval(std::vector<const IndexedRow*> rows, const Asked& asked, const Retrieved& out, int64_t threads)
    : rows_(std::move(rows)), asked_(asked), out_(out) {
    const int64_t count = rows_.size(), group = asked.group;
    if (!count || !group) return;
    cut(count, group, threads, out.keys_scored, tasks_);
    searches_.assign(count * group, nullptr);
    searches_left_ = std::vector<std::atomic<int64_t>>(count);
    for (auto& left : searches_left_) left.store(group, std::memory_order_relaxed);
    stages_ = std::vector<std::atomic<int>>(tasks_.size());
}

int64_t Retrieval::found() const { return arrivals_.late() ? kNotArrived : total_.load(); }

int64_t Retrieval::waited() const {
    const int64_t least = least_waited_;
    return least == std::numeric_limits<int64_t>::max() ? 0 : least;
}

// What is foreseen is searched for by whoever comes first, the dearest first; then everyone goes on with his own searches,
// whose keys are in his caches, and at last with those of others, as none shall wait for the slowest.
void Retrieval::work() {
    thread_local std::vector<int64_t> own;
    own.clear();
    const int64_t count = tasks_.size();
    std::chrono::nanoseconds idle{0};
    int64_t used = 0;
    if (asked_.foreseen)
        for (int64_t t; (t = next_.fetch_add(1, std::memory_order_relaxed)) < count;) {
            if (!search(tasks_[t], asked_.foreseen, std::max<int64_t>(asked_.foreseen_ef, 1), &used, idle)) return;
            stages_[t].store(kSearched, std::memory_order_release);
            own.push_back(t);
        }
    for (int64_t t : own)
        if (!go_on(t, idle)) return;
    for (int64_t left = 1; left;) {
        left = 0;
        for (int64_t t = 0; t < count; ++t) {
            if (arrivals_.late()) return;
            left += asked_.foreseen && stages_[t].load(std::memory_order_relaxed) == kNew;
            if (!go_on(t, idle)) return;
        }
        if (left) ThreadPool::pause();
    }
    int64_t least = least_waited_;
    while (idle.count() < least && !least_waited_.compare_exchange_weak(least, idle.count())) {
    }
}

// Takes a task that no one has taken and that is ready, to its end.
bool Retrieval::go_on(int64_t t, std::chrono::nanoseconds& idle) {
    int ready = asked_.foreseen ? kSearched : kNew;
    if (stages_[t].load(std::memory_order_relaxed) != ready ||
        !stages_[t].compare_exchange_strong(ready, kTaken, std::memory_order_acquire))
        return true;
    const Task& task = tasks_[t];
    int64_t used = 0;
    if (!search(task, asked_.queries, std::max(asked_.ef, asked_.k), asked_.foreseen ? nullptr : &used, idle)) return false;
    const int64_t group = asked_.group, k = asked_.k, width = group * k, r = task.row;
    for (int64_t at = r * group + task.begin; at < r * group + task.end; ++at)
        out_.keys_scored[at] = searches_[at]->finish(k, out_.ids + at * k, out_.scores ? out_.scores + at * k : nullptr);
    const int64_t done = task.end - task.begin;
    if (!out_.positions || searches_left_[r].fetch_sub(done) > done) return true;
    int32_t* positions = out_.positions + r * width;
    const int64_t found = unite(out_.ids + r * width, width, rows_[r]->first, positions);
    if (out_.clusters) look_up(*rows_[r], positions, found, width, out_.clusters + r * width);
    total_ += found;
    return true;
}

// A task's searches for their vectors `of` all queries, in turns. used: searches of the thread that are taken, to which
// these are added; null: those of the task go on. False where a vector is late.
bool Retrieval::search(const Task& task, const float* of, int64_t beam, int64_t* used, std::chrono::nanoseconds& idle) {
    const int64_t r = task.row, group = asked_.group, numbers = rows_[r]->graph.keys.width();
    const Starts starts{asked_.near + r * group * asked_.near_stride, group, asked_.num_near, asked_.near_stride};
    for (int64_t first = task.begin; first < task.end; first += kTurns) {
        std::array<BeamSearch*, kTurns> going;
        const int64_t turns = std::min(task.end - first, kTurns);
        for (int64_t i = 0; i < turns; ++i) {
            const int64_t head = first + i, at = r * group + head;
            const float* query = of + at * numbers;
            if (asked_.posted && !arrivals_.await(query, numbers, idle)) return false;
            if (used) {
                searches_[at] = &searches_of_thread(*used + 1)[*used];
                ++*used;
                searches_[at]->start(rows_[r]->graph, query, beam, starts, head);
            } else {
                searches_[at]->turn_to(query, beam);
            }
            going[i] = searches_[at];
        }
        take_turns(going.data(), turns);
    }
    return true;
}

int64_t retrieve(const std::vector<const IndexedRow*>& rows, const Asked& asked, const Retrieved& out, ThreadPool& pool) {
    Retrieval retrieval(rows, asked, out, pool.size());
    pool.parallel_for(std::min<int64_t>(pool.size(), retrieval.tasks()), 1, [&](int64_t) { retrieval.work(); });
    return retrieval.found();
}

}  // namespace rag
