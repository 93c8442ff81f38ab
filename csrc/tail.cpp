#include "tail.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace rag {

int64_t take_away(const Rows& values, const Clusters& clusters, const int32_t* positions, int64_t width, int64_t first,
                  const Reduced& out) {
    thread_local std::vector<uint64_t> lost;  // cluster, position
    thread_local std::vector<Rows::Term> terms;
    lost.clear();
    terms.clear();
    for (int64_t i = 0; i < width; ++i) {
        if (positions[i] < 0) continue;
        const int64_t token = positions[i] - first;
        if (token < 0 || token >= clusters.tokens)
            throw std::invalid_argument("positions: got " + std::to_string(positions[i]) + ", allowed: -1 and " +
                                        std::to_string(first) + " to " + std::to_string(first + clusters.tokens - 1));
        lost.push_back(static_cast<uint64_t>(clusters.assignment[token]) << 32 | static_cast<uint32_t>(positions[i]));
    }
    std::sort(lost.begin(), lost.end());

    std::fill_n(out.touched, width, clusters.row + clusters.count - 1);
    std::fill_n(out.log_left, width, -std::numeric_limits<float>::infinity());
    std::fill_n(out.scale, width, 0.f);
    std::fill_n(out.lost_mean, width * values.dim, 0.f);
    int64_t kept = 0;
    for (int64_t c = 0; c < clusters.count; ++c) kept += clusters.sizes[c] > 0.f;
    int32_t slot = 0;
    for (size_t begin = 0, end; begin < lost.size(); begin = end, ++slot) {
        const uint64_t cluster = lost[begin] >> 32;
        for (end = begin + 1; end < lost.size() && lost[end] >> 32 == cluster;) ++end;
        const float size = clusters.sizes[cluster];
        const float left = size - static_cast<float>(end - begin);
        out.touched[slot] = clusters.row + static_cast<int64_t>(cluster);
        if (left <= 0.f) {
            --kept;
            continue;
        }
        out.log_left[slot] = std::log(left);
        out.scale[slot] = size / left;
        for (size_t i = begin; i < end; ++i) terms.push_back({static_cast<int32_t>(lost[i]), slot, 1.f / left});
    }
    values.add(terms.data(), static_cast<int64_t>(terms.size()), out.lost_mean);
    return kept;
}

}  // namespace rag
