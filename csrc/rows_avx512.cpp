#include "row_kernels.h"

#ifdef RAG_X86
#include <immintrin.h>

// In GCC 12's own header every call of an unmasked conversion warns.
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define RAG_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define RAG_INLINE inline __attribute__((always_inline)) RAG_TARGET

namespace rag {
namespace {

struct Float {
    using Item = float;
    static RAG_INLINE __m512 load(__mmask16 mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }
};
struct Half {
    using Item = uint16_t;
    static RAG_INLINE __m512 load(__mmask16 mask, const uint16_t* from) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
    }
};
struct BFloat {
    using Item = uint16_t;
    static RAG_INLINE __m512 load(__mmask16 mask, const uint16_t* from) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
};
struct Int8 {
    using Item = int8_t;
    static RAG_INLINE __m512 load(__mmask16 mask, const int8_t* from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, from)));
    }
};

template <class Type>
RAG_TARGET void score(const Rows& rows, const float* query, const int32_t* ids, int64_t count, float* out) {
    constexpr __mmask16 kAll = 0xffff;
    const auto* base = static_cast<const typename Type::Item*>(rows.data);
    const int64_t dim = rows.dim;
    const auto some = static_cast<__mmask16>((1u << dim % 16) - 1);
    for (int64_t i = 0; i < count; ++i) {
        if (i + kRowsAhead < count) rows.prefetch(ids[i + kRowsAhead]);
        const auto* row = base + ids[i] * rows.stride;
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        int64_t d = 0;
        for (; d + 32 <= dim; d += 32) {
            even = _mm512_fmadd_ps(_mm512_loadu_ps(query + d), Type::load(kAll, row + d), even);
            odd = _mm512_fmadd_ps(_mm512_loadu_ps(query + d + 16), Type::load(kAll, row + d + 16), odd);
        }
        if (d + 16 <= dim) {
            even = _mm512_fmadd_ps(_mm512_loadu_ps(query + d), Type::load(kAll, row + d), even);
            d += 16;
        }
        if (some) odd = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, query + d), Type::load(some, row + d), odd);
        out[i] = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
        if (rows.scales) out[i] *= rows.scales[ids[i]];
    }
}

#undef RAG_TARGET
#define RAG_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

// Products of bfloat16 pairs, for queries that are bfloat16 too, of up to 128 dimensions, a multiple of 32: what models of
// that type ask. Others take the longer way.
RAG_TARGET void score_pairs(const Rows& rows, const float* query, const int32_t* ids, int64_t count, float* out) {
    constexpr int64_t kWide = 32, kMost = 4;
    const int64_t parts = rows.dim / kWide;
    if (rows.dim % kWide || parts > kMost) return score<BFloat>(rows, query, ids, count, out);
    __m512bh q[kMost];
    __mmask16 rounded = 0;
    for (int64_t p = 0; p < kMost; ++p) {
        if (p >= parts) {
            q[p] = __m512bh(_mm512_setzero_si512());
            continue;
        }
        const __m512 low = _mm512_loadu_ps(query + p * kWide), high = _mm512_loadu_ps(query + p * kWide + 16);
        const __m512i tails = _mm512_set1_epi32(0xffff);
        rounded |= _mm512_test_epi32_mask(_mm512_castps_si512(low), tails);
        rounded |= _mm512_test_epi32_mask(_mm512_castps_si512(high), tails);
        q[p] = _mm512_cvtne2ps_pbh(high, low);
    }
    if (rounded) return score<BFloat>(rows, query, ids, count, out);
    const auto* base = static_cast<const uint16_t*>(rows.data);
    for (int64_t i = 0; i < count; ++i) {
        if (i + kRowsAhead < count) rows.prefetch(ids[i + kRowsAhead]);
        const uint16_t* row = base + ids[i] * rows.stride;
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        const auto part = [&](int64_t p) RAG_TARGET { return __m512bh(_mm512_loadu_si512(row + p * kWide)); };
        even = _mm512_dpbf16_ps(even, q[0], part(0));
        if (parts > 1) odd = _mm512_dpbf16_ps(odd, q[1], part(1));
        if (parts > 2) even = _mm512_dpbf16_ps(even, q[2], part(2));
        if (parts > 3) odd = _mm512_dpbf16_ps(odd, q[3], part(3));
        out[i] = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
        if (rows.scales) out[i] *= rows.scales[ids[i]];
    }
}

}  // namespace

const RowKernel kAvx512Pairs{"avx512_bf16", {score<Float>, score<Half>, score_pairs, score<Int8>}};
const RowKernel kAvx512{"avx512", {score<Float>, score<Half>, score<BFloat>, score<Int8>}};

}  // namespace rag
#endif
