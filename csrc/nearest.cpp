#include "nearest.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "clones.h"

namespace rag {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kHalvings = 24;
constexpr int64_t kPanel = 16;  // blocks of keys that are packed at a time, for all queries
// Half a unit in the last place of 1.
constexpr float kRounding = 0x1p-24f;
// Added to every length, for what is too small for a normal number.
constexpr float kTiny = 1e-14f;

struct alignas(64) Line {
    char bytes[64];
};

// Blocks of kTile packed vectors.
class Blocks {
   public:
    Blocks(const TileKernel& kernel, int64_t count, int64_t depth)
        : bytes_(kTile * depth * kernel.item), high_(count * bytes_ / 64), low_(kernel.halves ? high_.size() : 0), filled_(count) {}

    char* high(int64_t i) { return high_.data()->bytes + i * bytes_; }
    char* low(int64_t i) { return low_.empty() ? nullptr : low_.data()->bytes + i * bytes_; }
    void fill(int64_t i, bool has_low) { filled_[i] = has_low; }
    Packed packed(int64_t i, bool fine) { return {high(i), fine && filled_[i] ? low(i) : nullptr}; }

   private:
    int64_t bytes_;
    std::vector<Line> high_, low_;
    std::vector<uint8_t> filled_;
};

// Lengths of a block's vectors, apart, so that loops over them are vectors' work.
struct BlockLengths {
    float all[kTile], low[kTile], rest[kTile];
};

// How far a key's product may be from its score, at most: by what is left out of both (Cauchy and Schwarz), by rounding
// of the sums of both. limits: below these no product is of use. Not `fine`: high parts alone are multiplied.
RAG_CLONES void set_limits(const BlockLengths& queries, const Lengths& keys, bool fine, float rounding, const float* best,
                           float* errors, float* limits) {
    const float rounded = rounding * keys.all;
    for (int64_t q = 0; q < kTile; ++q) {
        const float all = queries.all[q], low = queries.low[q], rest = queries.rest[q];
        const float with_low = all * (keys.rest + rounded) + low * keys.low + rest * (keys.all + keys.rest);
        const float without = all * (keys.low + keys.rest + rounded) + (low + rest) * (keys.all + keys.low + keys.rest);
        errors[q] = fine ? with_low : without;
        limits[q] = best[q] - errors[q];
    }
}

// Floats as whole numbers of the same order.
uint32_t ordered(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
float unordered(uint32_t bits) {
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// What every query has found.
class Candidates {
   public:
    Candidates(const Rows& keys, const float* queries, int64_t count, int64_t k, const Selection& select)
        : keys_(keys),
          queries_(queries),
          select_(select),
          k_(k),
          room_(std::max<int64_t>(4 * k, 128)),
          best_((count + kTile - 1) / kTile * kTile, -kInfinity),
          counts_(count, 0),
          bounds_(2 * count * room_),
          ids_(count * room_),
          exact_(room_) {
        std::fill(best_.begin() + count, best_.end(), kInfinity);
    }

    // [count] to a multiple of kTile: k keys are known to score as much.
    const float* best() const { return best_.data(); }
    int64_t ranked() const { return ranked_; }

    // Key first + i of scores[i] for every bit i of mask, each score known to `error`. Returns whether so many were as
    // near the best that they had to be ranked.
    bool add(int64_t q, const float* scores, float error, int32_t first, uint32_t mask) {
        bool crowded = false;
        if (counts_[q] > room_ - kTile) {
            tighten(q);
            crowded = counts_[q] > room_ - 2 * kTile;
            if (crowded) rank(q);
        }
        counts_[q] = select_.append(scores, error, first, mask, of(q), counts_[q]);
        return crowded;
    }
    void finish(int64_t q, int32_t* ids) {
        if (counts_[q] > k_) tighten(q);
        rank(q);
        std::copy_n(of(q).ids, counts_[q], ids);
        std::fill(ids + counts_[q], ids + k_, -1);
    }

   private:
    Found of(int64_t q) {
        float* lower = &bounds_[2 * q * room_];
        return {lower, lower + room_, &ids_[q * room_]};
    }

    // Raises what k keys are known to score, nearly as far as possible, and drops what cannot be among the k best.
    void tighten(int64_t q) {
        const Found found = of(q);
        const int64_t count = counts_[q];
        float least, most;
        select_.range(found.lower, count, &least, &most);
        least = std::max(least, best_[q]);
        if (!(least < most && most < kInfinity) || select_.count_from(found.lower, count, least) < k_) return;
        for (int step = 0; step < kHalvings; ++step) {
            const float middle = least / 2 + most / 2;
            if (!(middle > least && middle < most)) break;
            const int64_t above = select_.count_from(found.lower, count, middle);
            (above < k_ ? most : least) = middle;
            if (above >= k_ && above <= k_ + k_ / 8) break;
        }
        best_[q] = least;
        counts_[q] = select_.keep(found, count, least);
    }

    // Scores the candidates and keeps the k best of them, in order.
    void rank(int64_t q) {
        const Found found = of(q);
        const int64_t count = counts_[q], kept = std::min(count, k_);
        keys_.score(queries_ + q * keys_.width(), found.ids, count, found.lower);
        ranked_ += count;
        for (int64_t j = 0; j < count; ++j)
            exact_[j] = static_cast<uint64_t>(~ordered(found.lower[j] + 0.f)) << 32 | static_cast<uint32_t>(found.ids[j]);
        if (kept < count) std::nth_element(exact_.begin(), exact_.begin() + kept - 1, exact_.begin() + count);
        std::sort(exact_.begin(), exact_.begin() + kept);
        for (int64_t j = 0; j < kept; ++j) {
            found.lower[j] = found.upper[j] = unordered(~static_cast<uint32_t>(exact_[j] >> 32));
            found.ids[j] = static_cast<int32_t>(exact_[j]);
        }
        counts_[q] = kept;
        if (kept == k_) best_[q] = std::max(best_[q], found.lower[k_ - 1]);
    }

    const Rows& keys_;
    const float* queries_;
    const Selection& select_;
    int64_t k_, room_, ranked_ = 0;
    std::vector<float> best_;
    std::vector<int64_t> counts_;
    std::vector<float> bounds_;  // of every query room_ lower ones, then as many upper ones
    std::vector<int32_t> ids_;
    std::vector<uint64_t> exact_;
};

uint32_t first_bits(int64_t count) {
    return count <= 0 ? 0u : count >= 32 ? ~0u : (1u << count) - 1;
}

void lengthen(Lengths& lengths) {
    lengths.all += kTiny;
    lengths.low += kTiny;
    lengths.rest += kTiny;
}

}  // namespace

int64_t nearest_keys(const Rows& keys, const float* queries, const int64_t* visible, int64_t count, int64_t k,
                     const TileKernel& kernel, int32_t* ids) {
    const int64_t width = keys.width(), depth = (width + kernel.step - 1) / kernel.step * kernel.step;
    const int64_t groups = (count + kTile - 1) / kTile;
    const float rounding = kRounding * (1.1f * depth + width + 16);
    std::vector<float> rows(kTile * width);
    Lengths lengths[kTile];

    Blocks asked(kernel, groups, depth);
    std::vector<BlockLengths> asked_lengths(groups);
    std::vector<int64_t> first_end(groups), last_end(groups);
    std::vector<uint8_t> fine(groups, 0);  // groups whose keys the high parts alone do not tell apart
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * kTile, some = std::min(kTile, count - begin);
        std::fill(std::copy_n(queries + begin * width, some * width, rows.begin()), rows.end(), 0.f);
        asked.fill(g, kernel.pack_queries(rows.data(), width, depth, asked.high(g), asked.low(g), lengths));
        for (int64_t q = 0; q < kTile; ++q) {
            lengthen(lengths[q]);
            asked_lengths[g].all[q] = lengths[q].all;
            asked_lengths[g].low[q] = lengths[q].low;
            asked_lengths[g].rest[q] = lengths[q].rest;
        }
        const auto [least, most] = std::minmax_element(visible + begin, visible + begin + some);
        first_end[g] = some < kTile ? 0 : *least;
        last_end[g] = *most;
    }

    Candidates found(keys, queries, count, k, *kernel.selection);
    Blocks panel(kernel, kPanel, depth);
    Lengths longest[kPanel];
    alignas(64) float scores[kTile * kTile];
    alignas(64) char saved[64];
    uint32_t masks[kTile];
    float errors[kTile], limits[kTile];
    const int64_t end = groups ? *std::max_element(last_end.begin(), last_end.end()) : 0;
    if (kernel.begin) kernel.begin(saved);
    // From the last key on: the nearest of a text's keys are late ones more often than not.
    for (int64_t first = (end - 1) / (kPanel * kTile) * (kPanel * kTile); end && first >= 0; first -= kPanel * kTile) {
        const int64_t blocks = std::min(kPanel, (end - first + kTile - 1) / kTile);
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t begin = first + b * kTile, some = std::min(kTile, keys.n - begin);
            for (int64_t i = 0; i < some; ++i) keys.load(static_cast<int32_t>(begin + i), &rows[i * width]);
            std::fill(rows.begin() + some * width, rows.end(), 0.f);
            panel.fill(b, kernel.pack_keys(rows.data(), width, depth, panel.high(b), panel.low(b), lengths));
            longest[b] = {0.f, 0.f, 0.f};
            for (const Lengths& one : lengths)
                longest[b] = {std::max(longest[b].all, one.all), std::max(longest[b].low, one.low),
                              std::max(longest[b].rest, one.rest)};
            lengthen(longest[b]);
        }
        for (int64_t g = 0; g < groups; ++g) {
            for (int64_t b = blocks - 1; b >= 0; --b) {
                const int64_t begin = first + b * kTile;
                if (begin >= last_end[g]) continue;
                set_limits(asked_lengths[g], longest[b], fine[g], rounding, found.best() + g * kTile, errors, limits);
                kernel.multiply(asked.packed(g, fine[g]), panel.packed(b, fine[g]), depth, scores);
                uint32_t some = kernel.selection->compare(scores, limits, masks);
                const bool all_see = begin + kTile <= first_end[g];
                for (; some; some &= some - 1) {
                    const int64_t q = __builtin_ctz(some), at = g * kTile + q;
                    uint32_t mask = masks[q];
                    if (!all_see) mask &= first_bits(at < count ? visible[at] - begin : 0);
                    if (mask) fine[g] |= found.add(at, scores + q * kTile, errors[q], static_cast<int32_t>(begin), mask);
                }
            }
        }
    }
    if (kernel.end) kernel.end(saved);
    for (int64_t i = 0; i < count; ++i) found.finish(i, ids + i * k);
    return found.ranked();
}

}  // namespace rag
