// Products of 32 keys with 32 queries at a time, once for each kind of CPU: near what the keys' exact scores are.
#pragma once
#include <cstdint>
#include <vector>

#include "selection.h"

#if defined(RAG_X86) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define RAG_AMX 1
#endif

namespace rag {

// Lengths of a vector x and of what a kernel leaves out of it: x = high + low + rest. A kernel multiplies high by high,
// low by high and high by low.
struct Lengths {
    float all, low, rest;
};

// kTile vectors in a kernel's form. `low` is null where the low parts of all are 0.
struct Packed {
    const char* high;
    const char* low;
};

// A vector's packed form has `depth` elements, a multiple of `step` and no fewer than it has. Packed blocks are at
// multiples of 64 bytes, kTile * depth * item bytes each.
struct TileKernel {
    const char* name;
    int64_t step, item;
    bool halves;  // high and low, or all of it in high
    // Packs rows [kTile, dim] float32; lengths [kTile]. Returns whether a low part is not 0.
    bool (*pack_queries)(const float* rows, int64_t dim, int64_t depth, char* high, char* low, Lengths* lengths);
    bool (*pack_keys)(const float* rows, int64_t dim, int64_t depth, char* high, char* low, Lengths* lengths);
    // scores [kTile queries, kTile keys], at a multiple of 64 bytes.
    void (*multiply)(const Packed& queries, const Packed& keys, int64_t depth, float* scores);
    // Around the calls of multiply that a thread makes; null where nothing is to be done.
    void (*begin)(char saved[64]);
    void (*end)(const char saved[64]);
    const Selection* selection;
};

// Those that this CPU runs, fastest first. The last one is plain C++.
const std::vector<TileKernel>& tile_kernels();

#ifdef RAG_AMX
// The one of AMX in bfloat16, or null: the operating system has to allow it.
const TileKernel* amx_kernel();
#endif

}  // namespace rag
