// Exact lists of the nearest keys, for building.
#pragma once
#include <cstdint>

#include "rows.h"
#include "tile_kernels.h"

namespace rag {

// ids [count, k]: the nearest keys of every query of [count, keys.width()] among the keys 0 .. visible[i] - 1, by the
// inner product that Rows::score tells, equal ones by id, best first, -1 pads. visible[i] is 0 to keys.n, in any order.
// The kernel only finds candidates, keys whose product is so near the best that they can be among them: lists are the
// same by each. Holds, for a query, max(4 k, 128) candidates of 12 bytes and its packed form, beside 512 packed keys.
// Returns how many candidates were scored by Rows::score.
int64_t nearest_keys(const Rows& keys, const float* queries, const int64_t* visible, int64_t count, int64_t k,
                     const TileKernel& kernel, int32_t* ids);

}  // namespace rag
