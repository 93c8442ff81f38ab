#include "row_kernels.h"

#ifdef RAG_X86
#include <immintrin.h>

#define RAG_TARGET __attribute__((target("avx2,fma,f16c")))
#define RAG_INLINE inline __attribute__((always_inline)) RAG_TARGET

namespace rag {
namespace {

struct Float {
    using Item = float;
    static RAG_INLINE __m256 load(const float* from) { return _mm256_loadu_ps(from); }
};
struct Half {
    using Item = uint16_t;
    static RAG_INLINE __m256 load(const uint16_t* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
};
struct BFloat {
    using Item = uint16_t;
    static RAG_INLINE __m256 load(const uint16_t* from) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
};
struct Int8 {
    using Item = int8_t;
    static RAG_INLINE __m256 load(const int8_t* from) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    }
};

RAG_INLINE float sum(__m256 all) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <class Type>
RAG_TARGET void score(const Rows& rows, const float* query, const int32_t* ids, int64_t count, float* out) {
    const auto* base = static_cast<const typename Type::Item*>(rows.data);
    const int64_t dim = rows.dim, whole = dim / 8 * 8;
    for (int64_t i = 0; i < count; ++i) {
        if (i + kRowsAhead < count) rows.prefetch(ids[i + kRowsAhead]);
        const auto* row = base + ids[i] * rows.stride;
        __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
        int64_t d = 0;
        for (; d + 16 <= dim; d += 16) {
            even = _mm256_fmadd_ps(_mm256_loadu_ps(query + d), Type::load(row + d), even);
            odd = _mm256_fmadd_ps(_mm256_loadu_ps(query + d + 8), Type::load(row + d + 8), odd);
        }
        if (d < whole) even = _mm256_fmadd_ps(_mm256_loadu_ps(query + d), Type::load(row + d), even);
        if (whole < dim) {
            typename Type::Item last[8] = {};
            float asked[8] = {};
            for (d = whole; d < dim; ++d) last[d - whole] = row[d], asked[d - whole] = query[d];
            odd = _mm256_fmadd_ps(_mm256_loadu_ps(asked), Type::load(last), odd);
        }
        out[i] = sum(_mm256_add_ps(even, odd));
        if (rows.scales) out[i] *= rows.scales[ids[i]];
    }
}

}  // namespace

const RowKernel kAvx2{"avx2", {score<Float>, score<Half>, score<BFloat>, score<Int8>}};

}  // namespace rag
#endif
