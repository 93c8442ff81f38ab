// The inner loop of every search, once for each kind of CPU.
#pragma once
#include <vector>

#include "rows.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define RAG_X86 1
#endif

namespace rag {

// out[i] = <query, row ids[i]> without `extra`, in float32; rows need no alignment.
using ScoreRows = void (*)(const Rows& rows, const float* query, const int32_t* ids, int64_t count, float* out);

struct RowKernel {
    const char* name;
    ScoreRows score[4];  // by Dtype
};

// Those that this CPU runs, best first. The last one is plain C++.
const std::vector<RowKernel>& row_kernels();

#ifdef RAG_X86
extern const RowKernel kAvx2, kAvx512, kAvx512Pairs;
#endif

// How many rows ahead a kernel asks for one.
constexpr int64_t kRowsAhead = 4;

}  // namespace rag
