#include <algorithm>
#include <cmath>

#include "tile_kernels.h"

#define RAG_INLINE inline __attribute__((always_inline))

namespace rag {
namespace {

template <int kBytes>
struct Vector {
    typedef float type __attribute__((vector_size(kBytes)));
};

float length(const float* row, int64_t dim) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(row[d]) * row[d];
    return static_cast<float>(std::sqrt(sum) * (1 + 1e-6));
}

// Queries [kTile, depth] as they are.
bool pack_queries(const float* rows, int64_t dim, int64_t depth, char* high, char*, Lengths* lengths) {
    std::copy(rows, rows + kTile * depth, reinterpret_cast<float*>(high));
    for (int64_t i = 0; i < kTile; ++i) lengths[i] = {length(rows + i * dim, dim), 0.f, 0.f};
    return false;
}

// Keys [depth, kTile].
bool pack_keys(const float* rows, int64_t dim, int64_t depth, char* high, char*, Lengths* lengths) {
    auto* out = reinterpret_cast<float*>(high);
    for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t d = 0; d < depth; ++d) out[d * kTile + i] = rows[i * dim + d];
        lengths[i] = {length(rows + i * dim, dim), 0.f, 0.f};
    }
    return false;
}

// kRows queries at a time, their sums in registers of kBytes.
template <int kBytes, int kRows>
RAG_INLINE void multiply(const Packed& queries, const Packed& keys, int64_t depth, float* scores) {
    using V = typename Vector<kBytes>::type;
    constexpr int kParts = kTile * 4 / kBytes;
    const auto* rows = reinterpret_cast<const float*>(queries.high);
    const auto* columns = reinterpret_cast<const V*>(keys.high);
    for (int64_t i = 0; i < kTile; i += kRows, rows += kRows * depth) {
        V sums[kRows][kParts] = {};
        for (int64_t d = 0; d < depth; ++d)
            for (int j = 0; j < kRows; ++j)
                for (int p = 0; p < kParts; ++p) sums[j][p] += columns[d * kParts + p] * rows[j * depth + d];
        auto* out = reinterpret_cast<V*>(scores + i * kTile);
        for (int j = 0; j < kRows; ++j)
            for (int p = 0; p < kParts; ++p) out[j * kParts + p] = sums[j][p];
    }
}

void multiply_plain(const Packed& queries, const Packed& keys, int64_t depth, float* scores) {
    multiply<16, 1>(queries, keys, depth, scores);
}

const TileKernel kPlain{"plain", 1, 4, false, pack_queries, pack_keys, multiply_plain, nullptr, nullptr, &kSelectPlain};

#ifdef RAG_X86
#define RAG_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define RAG_AVX2 __attribute__((target("avx2,fma")))

RAG_AVX512 void multiply_avx512(const Packed& queries, const Packed& keys, int64_t depth, float* scores) {
    multiply<64, 8>(queries, keys, depth, scores);
}

RAG_AVX2 void multiply_avx2(const Packed& queries, const Packed& keys, int64_t depth, float* scores) {
    multiply<32, 2>(queries, keys, depth, scores);
}

const TileKernel kFloat512{"avx512", 1,       4,       false,         pack_queries, pack_keys, multiply_avx512,
                           nullptr,  nullptr, &kSelectAvx512};
const TileKernel kFloat256{"avx2", 1, 4, false, pack_queries, pack_keys, multiply_avx2, nullptr, nullptr, &kSelectAvx2};
#endif

}  // namespace

const std::vector<TileKernel>& tile_kernels() {
    static const std::vector<TileKernel> kernels = [] {
        std::vector<TileKernel> found;
#ifdef RAG_AMX
        if (const TileKernel* amx = amx_kernel()) found.push_back(*amx);
#endif
#ifdef RAG_X86
        for (const RowKernel& rows : row_kernels()) {  // the same instructions
            if (rows.name == kAvx512.name) found.push_back(kFloat512);
            if (rows.name == kAvx2.name) found.push_back(kFloat256);
        }
#endif
        found.push_back(kPlain);
        return found;
    }();
    return kernels;
}

}  // namespace rag
