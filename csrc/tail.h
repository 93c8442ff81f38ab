// What clusters lose to the tokens that are attended to otherwise.
#pragma once
#include <cstdint>

#include "rows.h"

namespace rag {

// One kv head's clusters: of every token the cluster, of every cluster the number of its tokens. The last has none.
struct Clusters {
    const int32_t* assignment;  // [tokens]
    int64_t tokens;
    const float* sizes;  // [count]
    int64_t count;
    int64_t row;  // of the first cluster, in tables of all heads
};

// The clusters that lost tokens, each once, by ascending number, [width]; pads after them.
struct Reduced {
    int64_t* touched;  // the cluster's row in tables of all heads; pads: the last cluster's
    float* log_left;   // log(tokens left); pads and where none is left: -inf
    float* scale;      // size / tokens left; pads and where none is left: 0
    float* lost_mean;  // [width, dim]: sum of the lost values / tokens left; pads and where none is left: 0
};

// Takes the tokens at positions [width] away from the clusters: none twice, any order, -1 pads. The token at position
// p of `values` is number p - first of the assignment. Returns how many clusters keep a token; throws
// std::invalid_argument for a position outside of [first, first + tokens).
int64_t take_away(const Rows& values, const Clusters& clusters, const int32_t* positions, int64_t width, int64_t first,
                  const Reduced& out);

}  // namespace rag
