// Retrieval of one step from the graphs of many kv heads, several sequences' too.
#pragma once
#include <chrono>
#include <cstdint>
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

// Searches every row, up to eight query heads in turns. A row's positions and clusters are made by the thread that ends
// its last search. All rows have keys of one width. Returns how many positions there are; kNotArrived where posted numbers
// did not come within kPatience, with `out` in no certain state.
//
// Posted queries are waited for by the threads that search with them: `waited`, if not null, gets the nanoseconds that each
// thread waited at least.
int64_t retrieve(const std::vector<const IndexedRow*>& rows, const Asked& asked, const Retrieved& out, ThreadPool& pool,
                 int64_t* waited = nullptr);
constexpr std::chrono::milliseconds kPatience{100};

}  // namespace rag
