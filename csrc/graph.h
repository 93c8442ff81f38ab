// Attention-aware graph over the keys of one kv head: construction.
#pragma once
#include <cstdint>
#include <vector>

#include "rows.h"
#include "thread_pool.h"

namespace rag {

struct Neighbour {
    float score;
    int32_t id;
};
// Nearer first; equal scores by id, so that every result is the same on every run.
inline bool nearer(const Neighbour& a, const Neighbour& b) {
    return a.score != b.score ? a.score > b.score : a.id < b.id;
}

// Id lists, best first, -1 pads: row i is data[i * width .. (i + 1) * width).
struct Lists {
    const int32_t* data;
    int64_t count;
    int64_t width;
    const int32_t* row(int64_t i) const { return data + i * width; }
};

// Merges keys begin..visible[i] - 1 into the exact list of query i: ids, scores [count, k], best first, -1 / -inf pads.
// queries: [count, dim] float32; visible: [count].
void extend_lists(const Rows& keys, const float* queries, const int64_t* visible, int64_t count, int64_t begin,
                  int64_t k, int32_t* ids, float* scores);

struct BuildOptions {
    int64_t degree;       // links of a key in all
    int64_t query_links;  // of these at most, from query lists
    int64_t num_entries;
    int64_t queries;      // lists of one query head, in the order of the text
    bool co_occurrence;   // how query lists make links: co_occurrence.h, or RoarGraph's projection
};

// One kv head: what its graph is built from, and where it goes. All heads of one build have equally many keys.
struct HeadInput {
    Rows keys;
    Lists query_lists;   // nearest keys of every prompt query
    Lists key_lists;     // nearest keys of every key
    int32_t* adjacency;  // [n, degree], -1 pads at the end
    int32_t* entries;    // [num_entries], -1 pads at the end
};

// Where searches start: the keys that the last queries rank first, which decode queries resemble most, the latest first;
// then `earlier` entries, then the first of the n keys. `queries` lists of each query head, in the order of the text.
// entries: [num_entries], -1 pads.
void choose_entries(const Lists& lists, int64_t queries, int64_t n, const std::vector<int32_t>& earlier, int64_t num_entries,
                    int32_t* entries);

// Makes links among the keys of the query -> key lists, by co-occurrence or by the projection step of RoarGraph (arXiv
// 2408.08933), adds the nearest keys up to the degree, and goes on as repair_graphs.
int64_t build_graphs(const std::vector<HeadInput>& inputs, const BuildOptions& options, ThreadPool& pool);

// Chooses the entries and links every key that they do not reach. Of the keys only the number is read. Returns the number of
// keys that had to be linked to become reachable.
int64_t repair_graphs(const std::vector<HeadInput>& inputs, const BuildOptions& options, ThreadPool& pool);

}  // namespace rag
