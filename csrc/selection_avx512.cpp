#include "selection.h"

#ifdef RAG_X86
#include <immintrin.h>

#include <limits>

// In GCC 12's own header every call of an unmasked conversion warns.
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define RAG_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,popcnt")))

namespace rag {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

RAG_TARGET uint32_t compare(const float* scores, const float* limits, uint32_t* masks) {
    uint32_t some = 0;
    for (int64_t q = 0; q < kTile; ++q, scores += kTile) {
        const __m512 limit = _mm512_set1_ps(limits[q]);
        const __mmask16 left = _mm512_cmp_ps_mask(_mm512_load_ps(scores), limit, _CMP_NLT_UQ);
        const __mmask16 right = _mm512_cmp_ps_mask(_mm512_load_ps(scores + 16), limit, _CMP_NLT_UQ);
        masks[q] = _mm512_kunpackw(right, left);
        some |= static_cast<uint32_t>(masks[q] != 0) << q;
    }
    return some;
}

RAG_TARGET int64_t append(const float* scores, float error, int32_t first, uint32_t mask, const Found& found,
                          int64_t count) {
    const __m512 around = _mm512_set1_ps(error);
    __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(first),
                                   _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (; mask; mask >>= 16, scores += 16, ids = _mm512_add_epi32(ids, _mm512_set1_epi32(16))) {
        const auto half = static_cast<__mmask16>(mask);
        const __m512 score = _mm512_loadu_ps(scores);
        __m512 lower = _mm512_sub_ps(score, around), upper = _mm512_add_ps(score, around);
        lower = _mm512_mask_mov_ps(lower, _mm512_cmp_ps_mask(lower, lower, _CMP_UNORD_Q), _mm512_set1_ps(-kInfinity));
        upper = _mm512_mask_mov_ps(upper, _mm512_cmp_ps_mask(upper, upper, _CMP_UNORD_Q), _mm512_set1_ps(kInfinity));
        _mm512_storeu_ps(found.lower + count, _mm512_maskz_compress_ps(half, lower));
        _mm512_storeu_ps(found.upper + count, _mm512_maskz_compress_ps(half, upper));
        _mm512_storeu_si512(found.ids + count, _mm512_maskz_compress_epi32(half, ids));
        count += __builtin_popcount(half);
    }
    return count;
}

// The first of `left` places of a vector.
RAG_TARGET inline __mmask16 first_of(int64_t left) {
    return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

RAG_TARGET void range(const float* values, int64_t count, float* least, float* most) {
    const __m512 none = _mm512_set1_ps(-kInfinity);
    __m512 low = _mm512_set1_ps(kInfinity), high = none;
    for (int64_t j = 0; j < count; j += 16) {
        const __m512 here = _mm512_mask_loadu_ps(none, first_of(count - j), values + j);
        low = _mm512_mask_min_ps(low, _mm512_cmp_ps_mask(here, none, _CMP_GT_OQ), low, here);
        high = _mm512_max_ps(high, here);
    }
    *least = _mm512_reduce_min_ps(low);
    *most = _mm512_reduce_max_ps(high);
}

RAG_TARGET int64_t count_from(const float* values, int64_t count, float least) {
    const __m512 limit = _mm512_set1_ps(least);
    int64_t reached = 0;
    for (int64_t j = 0; j < count; j += 16) {
        const __mmask16 some = first_of(count - j);
        const __m512 here = _mm512_maskz_loadu_ps(some, values + j);
        reached += __builtin_popcount(_mm512_mask_cmp_ps_mask(some, here, limit, _CMP_GE_OQ));
    }
    return reached;
}

RAG_TARGET int64_t keep(const Found& found, int64_t count, float least) {
    const __m512 limit = _mm512_set1_ps(least);
    int64_t kept = 0;
    for (int64_t j = 0; j < count; j += 16) {
        const __mmask16 some = first_of(count - j);
        const __m512 lower = _mm512_maskz_loadu_ps(some, found.lower + j);
        const __m512 upper = _mm512_maskz_loadu_ps(some, found.upper + j);
        const __m512i ids = _mm512_maskz_loadu_epi32(some, found.ids + j);
        const __mmask16 stays = _mm512_mask_cmp_ps_mask(some, upper, limit, _CMP_GE_OQ);
        const __mmask16 places = first_of(__builtin_popcount(stays));
        _mm512_mask_storeu_ps(found.lower + kept, places, _mm512_maskz_compress_ps(stays, lower));
        _mm512_mask_storeu_ps(found.upper + kept, places, _mm512_maskz_compress_ps(stays, upper));
        _mm512_mask_storeu_epi32(found.ids + kept, places, _mm512_maskz_compress_epi32(stays, ids));
        kept += __builtin_popcount(stays);
    }
    return kept;
}

}  // namespace

const Selection kSelectAvx512{compare, append, range, count_from, keep};

}  // namespace rag
#endif
