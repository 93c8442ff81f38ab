// What of many scores is kept, once for each kind of CPU.
#pragma once
#include <cstdint>

#include "row_kernels.h"

namespace rag {

// Queries and keys in a tile of scores.
constexpr int64_t kTile = 32;

// Keys that may be among a query's best: between which bounds each one's score is. append writes up to 16 places more
// than it fills.
struct Found {
    float *lower, *upper;
    int32_t* ids;
};

struct Selection {
    // Bit i of masks[q]: not scores[q, i] < limits[q]; scores [kTile queries, kTile keys] at a multiple of 64 bytes.
    // Returns the bits of the masks that are not 0.
    uint32_t (*compare)(const float* scores, const float* limits, uint32_t* masks);
    // Writes scores[i] less and plus `error` and first + i, for every bit i of mask, from place `count` on. Returns the
    // count after it. Bounds that are not a number become infinite.
    int64_t (*append)(const float* scores, float error, int32_t first, uint32_t mask, const Found& found, int64_t count);
    // The least and the largest of values above -infinity: {infinity, -infinity} where there is none.
    void (*range)(const float* values, int64_t count, float* least, float* most);
    int64_t (*count_from)(const float* values, int64_t count, float least);
    // Drops those whose upper bound is below `least`, in place and in order. Returns how many stay.
    int64_t (*keep)(const Found& found, int64_t count, float least);
};

extern const Selection kSelectPlain;
#ifdef RAG_X86
extern const Selection kSelectAvx2, kSelectAvx512;
#endif

}  // namespace rag
