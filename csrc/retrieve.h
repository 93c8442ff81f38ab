// Retrieval of one step from the graphs of many kv heads, several sequences' too.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <vector>

#include "graph_search.h"
#include "thread_pool.h"

namespace rag {

// A kv head of one sequence: its graph, the position of the graph's first key, and the cluster of each key, or null.
struct IndexedRow {
    Graph graph;
    int64_t first = 0;
    const int32_t* assignment = nullptr;  // [n]
};

// One query for each query head of each of R rows, and where their searches start, as Starts has it.
struct Asked {
    const float* queries;  // [R, group, width()]
    int64_t group;
    const int32_t* near;  // [R, group, near_stride]
    int64_t near_stride, num_near;
    int64_t k, ef;
    // Where `posted`, queries and foreseen may still be on their way, written by a device: a number of the bits kAbsent is
    // not there yet.
    bool posted = false;
    // What the queries will be about, like queries, or null. Every search is first one for this, with a beam of
    // foreseen_ef, and then turns to the query, with one of max(ef, k): all that it met is scored for both.
    const float* foreseen = nullptr;
    int64_t foreseen_ef = 0;
};
constexpr uint32_t kAbsent = 0xffffffffu;  // a NaN that no arithmetic makes
constexpr int64_t kNotArrived = -1;

// Where it goes. Nothing of it may be what `Asked` names.
struct Retrieved {
    int32_t* ids;          // [R, group, k], best first, -1 pads
    float* scores;         // likewise, -inf pads; or null
    int64_t* keys_scored;  // [R, group]; comes with what the step before scored, or zeros, and decides who searches what
    int32_t* positions;    // [R, group * k]: ids of the group plus `first`, each once, in the order met, -1 pads; or null
    int32_t* clusters;     // [R, group * k], of each position, -1 pads; or null. All rows have an assignment then.
};

// Waits for posted numbers, on behalf of all threads of a retrieval.
class Arrivals {
   public:
    bool late() const { return late_.load(std::memory_order_relaxed); }
    // False once one has waited for longer than kPatience. Adds to `waited`.
    bool await(const float* numbers, int64_t count, std::chrono::nanoseconds& waited);

   private:
    std::atomic<bool> late_{false};
};
constexpr std::chrono::milliseconds kPatience{100};

// Some searches of one row: the query heads begin..end - 1, done by one thread. In its caches they find what the others of
// the row loaded, and one's wait for memory is another's turn.
struct Task {
    int64_t row, begin, end, cost;
};

// Searches every row, up to eight query heads in turns, by all threads that call `work`. A row's positions and clusters are
// made by the thread that ends its last search. All rows have keys of one width. What `asked` and `out` name must outlive
// it. The results do not depend on who works.
class Retrieval {
   public:
    // threads: how many will work.
    Retrieval(std::vector<const IndexedRow*> rows, const Asked& asked, const Retrieved& out, int64_t threads);
    Retrieval(const Retrieval&) = delete;
    Retrieval& operator=(const Retrieval&) = delete;

    int64_t tasks() const { return tasks_.size(); }
    void work();
    // Behind all work: how many positions there are; kNotArrived where posted numbers did not come within kPatience, with
    // `out` in no certain state.
    int64_t found() const;
    // The nanoseconds for which every thread waited for posted numbers, or longer.
    int64_t waited() const;

   private:
    enum Stage : int { kNew, kSearched, kTaken };
    bool go_on(int64_t task, std::chrono::nanoseconds& idle);
    bool search(const Task& task, const float* of, int64_t beam, int64_t* used, std::chrono::nanoseconds& idle);

    const std::vector<const IndexedRow*> rows_;
    const Asked asked_;
    const Retrieved out_;
    std::vector<Task> tasks_;
    std::vector<BeamSearch*> searches_;  // [R, group], of the thread that began them
    std::vector<std::atomic<int64_t>> searches_left_;  // of every row
    std::vector<std::atomic<int>> stages_;  // of every task
    std::atomic<int64_t> next_{0}, total_{0}, least_waited_{std::numeric_limits<int64_t>::max()};
    Arrivals arrivals_;
};

// All of a Retrieval by the pool's threads; its `found`.
int64_t retrieve(const std::vector<const IndexedRow*>& rows, const Asked& asked, const Retrieved& out, ThreadPool& pool);

}  // namespace rag
