#include "selection.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "clones.h"

#ifdef RAG_X86
#include <immintrin.h>
#endif

namespace rag {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

uint32_t compare(const float* scores, const float* limits, uint32_t* masks) {
    uint32_t some = 0;
    for (int64_t q = 0; q < kTile; ++q, scores += kTile) {
        const float limit = limits[q];
        uint32_t mask = 0;
        int any = 0;
        for (int64_t i = 0; i < kTile; ++i) any |= !(scores[i] < limit);
        for (int64_t i = 0; any && i < kTile; ++i) mask |= static_cast<uint32_t>(!(scores[i] < limit)) << i;
        masks[q] = mask;
        some |= static_cast<uint32_t>(any) << q;
    }
    return some;
}

int64_t append(const float* scores, float error, int32_t first, uint32_t mask, const Found& found, int64_t count) {
    for (; mask; mask &= mask - 1, ++count) {
        const int i = __builtin_ctz(mask);
        const float lower = scores[i] - error, upper = scores[i] + error;
        found.lower[count] = std::isnan(lower) ? -kInfinity : lower;
        found.upper[count] = std::isnan(upper) ? kInfinity : upper;
        found.ids[count] = first + i;
    }
    return count;
}

void range(const float* values, int64_t count, float* least, float* most) {
    *least = kInfinity;
    *most = -kInfinity;
    for (int64_t j = 0; j < count; ++j) {
        if (values[j] == -kInfinity) continue;
        *least = std::min(*least, values[j]);
        *most = std::max(*most, values[j]);
    }
}

RAG_CLONES int64_t count_from(const float* values, int64_t count, float least) {
    int32_t reached = 0;
    for (int64_t j = 0; j < count; ++j) reached += values[j] >= least;
    return reached;
}

int64_t keep(const Found& found, int64_t count, float least) {
    int64_t kept = 0;
    for (int64_t j = 0; j < count; ++j) {
        const bool stays = found.upper[j] >= least;
        found.lower[kept] = found.lower[j];
        found.upper[kept] = found.upper[j];
        found.ids[kept] = found.ids[j];
        kept += stays;
    }
    return kept;
}

#ifdef RAG_X86
__attribute__((target("avx2"))) uint32_t compare_avx2(const float* scores, const float* limits, uint32_t* masks) {
    uint32_t some = 0;
    for (int64_t q = 0; q < kTile; ++q, scores += kTile) {
        const __m256 limit = _mm256_set1_ps(limits[q]);
        uint32_t mask = 0;
        for (int i = 0; i < kTile; i += 8) {
            const __m256 reached = _mm256_cmp_ps(_mm256_load_ps(scores + i), limit, _CMP_NLT_UQ);
            mask |= static_cast<uint32_t>(_mm256_movemask_ps(reached)) << i;
        }
        masks[q] = mask;
        some |= static_cast<uint32_t>(mask != 0) << q;
    }
    return some;
}
#endif

}  // namespace

const Selection kSelectPlain{compare, append, range, count_from, keep};
#ifdef RAG_X86
const Selection kSelectAvx2{compare_avx2, append, range, count_from, keep};
#endif

}  // namespace rag
