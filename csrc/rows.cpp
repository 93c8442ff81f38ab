#include "rows.h"

#include <cstring>
#include <stdexcept>

#include "clones.h"
#include "row_kernels.h"

namespace rag {
namespace {

struct Half {
    uint16_t bits;
    // Branch-free for normal numbers and subnormals: rescale the exponent by a float multiplication, patch Inf/NaN.
    operator float() const {
        const uint32_t magnitude = (bits & 0x7fffu) << 13;
        float value;
        std::memcpy(&value, &magnitude, 4);
        value *= 0x1p112f;
        uint32_t out;
        std::memcpy(&out, &value, 4);
        out |= (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
        out |= static_cast<uint32_t>(bits & 0x8000u) << 16;
        std::memcpy(&value, &out, 4);
        return value;
    }
};

struct BFloat {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
};

template <class T>
void score_rows(const Rows& rows, const float* query, const int32_t* ids, int64_t count, float* out) {
    const T* base = static_cast<const T*>(rows.data);
    for (int64_t i = 0; i < count; ++i) {
        if (i + kRowsAhead < count) rows.prefetch(ids[i + kRowsAhead]);
        const T* row = base + ids[i] * rows.stride;
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < rows.dim; ++d) sum += query[d] * static_cast<float>(row[d]);
        out[i] = rows.scales ? sum * rows.scales[ids[i]] : sum;
    }
}

const RowKernel kPlain{"plain", {score_rows<float>, score_rows<Half>, score_rows<BFloat>, score_rows<int8_t>}};

template <class T>
void load_row(const Rows& rows, int32_t id, float* out) {
    const T* row = static_cast<const T*>(rows.data) + id * rows.stride;
    const float scale = rows.scales ? rows.scales[id] : 1.f;
    for (int64_t d = 0; d < rows.dim; ++d) out[d] = scale * static_cast<float>(row[d]);
}

}  // namespace

RAG_CLONES bool any_above(const float* row, const float* rows, int64_t count, int64_t dim, float limit) {
    for (int64_t i = 0; i < count; ++i, rows += dim) {
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim; ++d) sum += row[d] * rows[d];
        if (sum > limit) return true;
    }
    return false;
}

const std::vector<RowKernel>& row_kernels() {
    static const std::vector<RowKernel> kernels = [] {
        std::vector<RowKernel> found;
#ifdef RAG_X86
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            found.push_back(kAvx512Pairs);
        if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            found.push_back(kAvx512);
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
            found.push_back(kAvx2);
#endif
        found.push_back(kPlain);
        return found;
    }();
    return kernels;
}

void Rows::score(const float* query, const int32_t* ids, int64_t count, float* out) const {
    static const RowKernel best = row_kernels().front();
    best.score[static_cast<int>(dtype)](*this, query, ids, count, out);
    if (extra)
        for (int64_t i = 0; i < count; ++i) out[i] += query[dim] * extra[ids[i]];
}

void Rows::load(int32_t id, float* out) const {
    switch (dtype) {
        case Dtype::float32: load_row<float>(*this, id, out); break;
        case Dtype::float16: load_row<Half>(*this, id, out); break;
        case Dtype::bfloat16: load_row<BFloat>(*this, id, out); break;
        case Dtype::int8: load_row<int8_t>(*this, id, out); break;
    }
    if (extra) out[dim] = extra[id];
}

}  // namespace rag
