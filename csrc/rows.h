// Read-only rows of keys in the types of the KV store and of its compact copy, scored against a float32 query.
#pragma once
#include <cstdint>

namespace rag {

enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2, int8 = 3 };

inline int64_t item_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::int8 ? 1 : 2; }

// One kv head's keys: n rows of `dim` contiguous elements, `stride` elements apart, times scales[row] where that is not
// null, and where `extra` is not null one more dimension, extra[row]. Float32 vectors beside them have `width()` elements.
struct Rows {
    const void* data;
    Dtype dtype;
    int64_t n;
    int64_t dim;
    int64_t stride;
    const float* extra;
    const float* scales = nullptr;

    int64_t width() const { return dim + (extra ? 1 : 0); }
    int64_t row_bytes() const { return dim * item_bytes(dtype); }
    // Asks for a row that will be read soon.
    void prefetch(int32_t id) const {
        const char* row = static_cast<const char*>(data) + id * stride * item_bytes(dtype);
        for (int64_t at = 0; at < row_bytes(); at += 64) __builtin_prefetch(row + at);
        if (scales) __builtin_prefetch(scales + id);
    }
    // out[i] = <query, row ids[i]> in float32.
    void score(const float* query, const int32_t* ids, int64_t count, float* out) const;
    // out[0..width()) = row `id` in float32.
    void load(int32_t id, float* out) const;
};

// Is there an inner product of `row` with one of the `count` float32 rows [count, dim] that is above `limit`?
bool any_above(const float* row, const float* rows, int64_t count, int64_t dim, float limit);

}  // namespace rag
