// What the files of Python bindings share. Tensors come as addresses: the caller owns them, keeps them alive and has checked
// their shapes.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "rows.h"
#include "thread_pool.h"

namespace rag {

// The pool of the latest thread count asked for; a caller that still works with the one before keeps that alive.
// A forked child has none of its parent's threads, torch's neither: it leaves their pool alone and makes its own.
std::shared_ptr<ThreadPool> threads(int count);

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Keys or values of all kv heads: [heads, n, dim] with contiguous rows, and extra and scales [heads, n] float32 or
// nothing (0).
struct KeyStore {
    uintptr_t address;
    int dtype;
    int64_t heads, n, dim, head_stride, row_stride;
    uintptr_t extra, scales;

    Rows head(int64_t i) const {
        const auto type = static_cast<Dtype>(dtype);
        const auto row_of = [&](uintptr_t floats) { return floats ? at<const float>(floats) + i * n : nullptr; };
        return {at<const char>(address) + i * head_stride * item_bytes(type), type, n, dim, row_stride, row_of(extra),
                row_of(scales)};
    }
};

// Adds the functions that search, to the module that KeyStore is in.
void bind_search(pybind11::module_& m);

}  // namespace rag
