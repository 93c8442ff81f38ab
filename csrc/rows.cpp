#include "rows.h"

#include <cstring>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define RAG_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RAG_CLONES
#endif

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
inline __attribute__((always_inline)) void score_rows(const float* query, const Rows& rows, const int32_t* ids,
                                                      int64_t count, float* out) {
    const T* base = static_cast<const T*>(rows.data);
    const int64_t dim = rows.dim;
    constexpr int64_t kAhead = 4;
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < count; ++i) {
        if (i + kAhead < count) {
            const T* next = base + ids[i + kAhead] * rows.stride;
            for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(next + d);
        }
        const T* row = base + ids[i] * rows.stride;
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim; ++d) sum += query[d] * static_cast<float>(row[d]);
        out[i] = sum;
    }
}

RAG_CLONES void score_float(const float* q, const Rows& r, const int32_t* ids, int64_t n, float* out) {
    score_rows<float>(q, r, ids, n, out);
}
RAG_CLONES void score_half(const float* q, const Rows& r, const int32_t* ids, int64_t n, float* out) {
    score_rows<Half>(q, r, ids, n, out);
}
RAG_CLONES void score_bfloat(const float* q, const Rows& r, const int32_t* ids, int64_t n, float* out) {
    score_rows<BFloat>(q, r, ids, n, out);
}

template <class T>
inline __attribute__((always_inline)) void add_rows(const Rows& rows, const Rows::Term* terms, int64_t count,
                                                    float* out) {
    const T* base = static_cast<const T*>(rows.data);
    const int64_t dim = rows.dim;
    constexpr int64_t kAhead = 8;
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < count; ++i) {
        if (i + kAhead < count) {
            const T* next = base + terms[i + kAhead].id * rows.stride;
            for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(next + d);
        }
        const T* row = base + terms[i].id * rows.stride;
        const float weight = terms[i].weight;
        float* sum = out + terms[i].slot * dim;
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) sum[d] += weight * static_cast<float>(row[d]);
    }
}

RAG_CLONES void add_float(const Rows& r, const Rows::Term* terms, int64_t n, float* out) {
    add_rows<float>(r, terms, n, out);
}
RAG_CLONES void add_half(const Rows& r, const Rows::Term* terms, int64_t n, float* out) {
    add_rows<Half>(r, terms, n, out);
}
RAG_CLONES void add_bfloat(const Rows& r, const Rows::Term* terms, int64_t n, float* out) {
    add_rows<BFloat>(r, terms, n, out);
}

template <class T>
void load_row(const Rows& rows, int32_t id, float* out) {
    const T* row = static_cast<const T*>(rows.data) + id * rows.stride;
    for (int64_t d = 0; d < rows.dim; ++d) out[d] = static_cast<float>(row[d]);
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

void Rows::score(const float* query, const int32_t* ids, int64_t count, float* out) const {
    switch (dtype) {
        case Dtype::float32: score_float(query, *this, ids, count, out); break;
        case Dtype::float16: score_half(query, *this, ids, count, out); break;
        case Dtype::bfloat16: score_bfloat(query, *this, ids, count, out); break;
    }
    if (extra)
        for (int64_t i = 0; i < count; ++i) out[i] += query[dim] * extra[ids[i]];
}

void Rows::load(int32_t id, float* out) const {
    switch (dtype) {
        case Dtype::float32: load_row<float>(*this, id, out); break;
        case Dtype::float16: load_row<Half>(*this, id, out); break;
        case Dtype::bfloat16: load_row<BFloat>(*this, id, out); break;
    }
    if (extra) out[dim] = extra[id];
}

void Rows::add(const Term* terms, int64_t count, float* out) const {
    switch (dtype) {
        case Dtype::float32: add_float(*this, terms, count, out); break;
        case Dtype::float16: add_half(*this, terms, count, out); break;
        case Dtype::bfloat16: add_bfloat(*this, terms, count, out); break;
    }
}

}  // namespace rag
