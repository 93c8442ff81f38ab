// Keys that come later enter the graph of a kv head.
#pragma once
#include <cstdint>
#include <vector>

#include "graph.h"
#include "links.h"

namespace rag {

// One kv head that grows from `before` keys to keys.n. All heads of one call have as many keys and as many queries.
struct HeadGrowth {
    Rows keys;
    int64_t before;
    const float* queries;  // [group, queries, keys.width()], those that saw new keys
    int32_t* lists;        // [group, queries, list width], -1 pads: their nearest old keys, to which new ones are added
    float* list_scores;    // likewise, -inf pads
    Lists near;            // [keys.n - before, width]: old keys among which the nearest of each new key are looked for
    const float* mean;     // [keys.width()], of the keys that the graph was built over
    const float* form;     // [keys.width()] twice: the metric's, symmetric; null for the plain cosine
    const float* reciprocals;  // [keys.n]: 1 / length in the metric of a key less the mean, 0 where there is none
    Links links;           // of all keys, of which the new ones' rows are written and some others' changed
    int32_t* entries;      // [num_entries], -1 pads at the end
};

// Makes links of the lists, as build_graphs does, for the keys that they concern, and links every new key to its nearest
// by mean-centred cosine in the metric, and these to it where it is nearer than what they have. Of an old key that few
// lists name the links by earlier queries stay. Query i of each query head sees
// the keys 0 .. visible[i] - 1, all old ones among them, visible non-decreasing. `options.queries` is their number.
// Entries are chosen anew, the earlier ones after those of the new lists; what is cut off is linked. Returns the number of
// keys that had to be linked to become reachable. The same for any number of threads.
int64_t insert_keys(const std::vector<HeadGrowth>& inputs, const BuildOptions& options, int64_t group, int64_t list_width,
                    const int64_t* visible, ThreadPool& pool);

}  // namespace rag
