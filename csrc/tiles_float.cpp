#include <algorithm>
#include <cmath>

#include "tile_kernels.h"

#ifdef RAG_X86
#include <immintrin.h>
#endif

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

// Keys [kTile, depth] as they are.
bool pack_keys(const float* rows, int64_t dim, int64_t depth, char* high, char*, Lengths* lengths) {
    std::copy(rows, rows + kTile * depth, reinterpret_cast<float*>(high));
    for (int64_t i = 0; i < kTile; ++i) lengths[i] = {length(rows + i * dim, dim), 0.f, 0.f};
    return false;
}

// Queries [depth, kTile].
bool pack_queries(const float* rows, int64_t dim, int64_t depth, char* high, char*, Lengths* lengths) {
    auto* out = reinterpret_cast<float*>(high);
    for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t d = 0; d < depth; ++d) out[d * kTile + i] = rows[i * dim + d];
        lengths[i] = {length(rows + i * dim, dim), 0.f, 0.f};
    }
    return false;
}

// kKeys keys at a time, their sums in registers of kBytes.
template <int kBytes, int kKeys>
RAG_INLINE void multiply(const Packed& keys, const Packed& queries, int64_t depth, float* scores) {
    using V = typename Vector<kBytes>::type;
    constexpr int kParts = kTile * 4 / kBytes;
    const auto* rows = reinterpret_cast<const float*>(keys.high);
    const auto* columns = reinterpret_cast<const V*>(queries.high);
    for (int64_t i = 0; i < kTile; i += kKeys, rows += kKeys * depth) {
        V sums[kKeys][kParts] = {};
        for (int64_t d = 0; d < depth; ++d)
            for (int j = 0; j < kKeys; ++j)
                for (int p = 0; p < kParts; ++p) sums[j][p] += columns[d * kParts + p] * rows[j * depth + d];
        auto* out = reinterpret_cast<V*>(scores + i * kTile);
        for (int j = 0; j < kKeys; ++j)
            for (int p = 0; p < kParts; ++p) out[j * kParts + p] = sums[j][p];
    }
}

void multiply_plain(const Packed& keys, const Packed& queries, int64_t depth, float* scores) {
    multiply<16, 1>(keys, queries, depth, scores);
}

uint32_t compare_plain(const float* scores, const float* limits, uint32_t* masks) {
    uint32_t some = 0;
    for (int64_t i = 0; i < kTile; ++i, scores += kTile) {
        uint32_t mask = 0;
        int any = 0;
        for (int64_t q = 0; q < kTile; ++q) any |= !(scores[q] < limits[q]);
        for (int64_t q = 0; any && q < kTile; ++q) mask |= static_cast<uint32_t>(!(scores[q] < limits[q])) << q;
        masks[i] = mask;
        some |= static_cast<uint32_t>(any) << i;
    }
    return some;
}

const TileKernel kPlain{"plain", 1, 4, false, pack_keys, pack_queries, multiply_plain, compare_plain, nullptr, nullptr};

#ifdef RAG_X86
#define RAG_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define RAG_AVX2 __attribute__((target("avx2,fma")))

RAG_AVX512 void multiply_avx512(const Packed& keys, const Packed& queries, int64_t depth, float* scores) {
    multiply<64, 8>(keys, queries, depth, scores);
}

RAG_AVX512 uint32_t compare_avx512(const float* scores, const float* limits, uint32_t* masks) {
    const __m512 left = _mm512_loadu_ps(limits), right = _mm512_loadu_ps(limits + 16);
    uint32_t some = 0;
    for (int64_t i = 0; i < kTile; ++i, scores += kTile) {
        const __mmask16 low = _mm512_cmp_ps_mask(_mm512_load_ps(scores), left, _CMP_NLT_UQ);
        const __mmask16 high = _mm512_cmp_ps_mask(_mm512_load_ps(scores + 16), right, _CMP_NLT_UQ);
        masks[i] = _mm512_kunpackw(high, low);
        some |= static_cast<uint32_t>(masks[i] != 0) << i;
    }
    return some;
}

RAG_AVX2 void multiply_avx2(const Packed& keys, const Packed& queries, int64_t depth, float* scores) {
    multiply<32, 2>(keys, queries, depth, scores);
}

RAG_AVX2 uint32_t compare_avx2(const float* scores, const float* limits, uint32_t* masks) {
    uint32_t some = 0;
    for (int64_t i = 0; i < kTile; ++i, scores += kTile) {
        uint32_t mask = 0;
        for (int q = 0; q < kTile; q += 8) {
            const __m256 reach = _mm256_cmp_ps(_mm256_load_ps(scores + q), _mm256_loadu_ps(limits + q), _CMP_NLT_UQ);
            mask |= static_cast<uint32_t>(_mm256_movemask_ps(reach)) << q;
        }
        masks[i] = mask;
        some |= static_cast<uint32_t>(mask != 0) << i;
    }
    return some;
}

const TileKernel kFloat512{"avx512",        1,  4, false, pack_keys, pack_queries, multiply_avx512,
                           compare_avx512, nullptr, nullptr};
const TileKernel kFloat2{"avx2", 1, 4, false, pack_keys, pack_queries, multiply_avx2, compare_avx2, nullptr, nullptr};
#endif

}  // namespace

const std::vector<TileKernel>& tile_kernels() {
    static const std::vector<TileKernel> kernels = [] {
        std::vector<TileKernel> found;
#ifdef RAG_X86
        if (const TileKernel* amx = amx_kernel()) found.push_back(*amx);
        for (const RowKernel& rows : row_kernels()) {  // the same instructions
            if (rows.name == kAvx512.name) found.push_back(kFloat512);
            if (rows.name == kAvx2.name) found.push_back(kFloat2);
        }
#endif
        found.push_back(kPlain);
        return found;
    }();
    return kernels;
}

}  // namespace rag
