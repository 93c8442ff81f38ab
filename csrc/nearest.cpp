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

void lengthen(Lengths& lengths) {
    lengths.all += kTiny;
    lengths.low += kTiny;
    lengths.rest += kTiny;
}

// Blocks of kTile packed vectors.
class Blocks {
   public:
    Blocks(const TileKernel& kernel, int64_t count, int64_t depth)
        : bytes_(kTile * depth * kernel.item),
          high_(count * bytes_ / 64),
          low_(kernel.halves ? high_.size() : 0),
          has_low_(count) {}

    char* high(int64_t i) { return high_.data()->bytes + i * bytes_; }
    char* low(int64_t i) { return low_.empty() ? nullptr : low_.data()->bytes + i * bytes_; }
    void set_low(int64_t i, bool has_low) { has_low_[i] = has_low; }
    Packed packed(int64_t i, bool fine) { return {high(i), fine && has_low_[i] ? low(i) : nullptr}; }

   private:
    int64_t bytes_;
    std::vector<Line> high_, low_;
    std::vector<uint8_t> has_low_;
};

// Lengths of a block's vectors, apart, so that loops over them are vectors' work.
struct BlockLengths {
    float all[kTile], low[kTile], rest[kTile];
};

// All queries of a call, in groups of kTile.
class Queries {
   public:
    struct Group {
        int64_t begin;
        int64_t all_see, some_see;  // kTile queries see the keys before all_see, none those from some_see on
        bool fine = false;          // are the high parts alone too coarse?
        BlockLengths lengths;
    };

    Queries(const TileKernel& kernel, const float* rows, const int64_t* visible, int64_t count, int64_t width,
            int64_t depth)
        : groups((count + kTile - 1) / kTile), blocks_(kernel, groups.size(), depth) {
        std::vector<float> some_rows(kTile * width);
        Lengths lengths[kTile];
        for (size_t g = 0; g < groups.size(); ++g) {
            Group& group = groups[g];
            group.begin = g * kTile;
            const int64_t some = std::min(kTile, count - group.begin);
            const auto [least, most] = std::minmax_element(visible + group.begin, visible + group.begin + some);
            group.all_see = some < kTile ? 0 : *least;
            group.some_see = *most;
            end = std::max(end, *most);
            std::fill(std::copy_n(rows + group.begin * width, some * width, some_rows.begin()), some_rows.end(), 0.f);
            char *high = blocks_.high(g), *low = blocks_.low(g);
            blocks_.set_low(g, kernel.pack_queries(some_rows.data(), width, depth, high, low, lengths));
            for (int64_t q = 0; q < kTile; ++q) {
                lengthen(lengths[q]);
                group.lengths.all[q] = lengths[q].all;
                group.lengths.low[q] = lengths[q].low;
                group.lengths.rest[q] = lengths[q].rest;
            }
        }
    }
    Packed packed(const Group& group) { return blocks_.packed(group.begin / kTile, group.fine); }

    std::vector<Group> groups;
    int64_t end = 0;  // keys from here on are seen by none

   private:
    Blocks blocks_;
};

// Some blocks of keys, packed.
class Panel {
   public:
    Panel(const TileKernel& kernel, int64_t width, int64_t depth)
        : kernel_(kernel), width_(width), depth_(depth), blocks_(kernel, kPanel, depth), rows_(kTile * width) {}

    void fill(const Rows& keys, int64_t first, int64_t end) {
        Lengths lengths[kTile];
        count = std::min(kPanel, (end - first + kTile - 1) / kTile);
        for (int64_t b = 0; b < count; ++b) {
            const int64_t begin = first + b * kTile, some = std::min(kTile, keys.n - begin);
            for (int64_t i = 0; i < some; ++i) keys.load(static_cast<int32_t>(begin + i), &rows_[i * width_]);
            std::fill(rows_.begin() + some * width_, rows_.end(), 0.f);
            char *high = blocks_.high(b), *low = blocks_.low(b);
            blocks_.set_low(b, kernel_.pack_keys(rows_.data(), width_, depth_, high, low, lengths));
            longest[b] = {0.f, 0.f, 0.f};
            for (const Lengths& one : lengths) {
                longest[b].all = std::max(longest[b].all, one.all);
                longest[b].low = std::max(longest[b].low, one.low);
                longest[b].rest = std::max(longest[b].rest, one.rest);
            }
            lengthen(longest[b]);
        }
    }
    Packed packed(int64_t b, bool fine) { return blocks_.packed(b, fine); }

    int64_t count = 0;
    Lengths longest[kPanel];  // of each block's keys

   private:
    const TileKernel& kernel_;
    int64_t width_, depth_;
    Blocks blocks_;
    std::vector<float> rows_;
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

}  // namespace

int64_t nearest_keys(const Rows& keys, const float* queries, const int64_t* visible, int64_t count, int64_t k,
                     const TileKernel& kernel, int32_t* ids) {
    const int64_t width = keys.width(), depth = (width + kernel.step - 1) / kernel.step * kernel.step;
    // Of the tile's sum and of the score's, as many additions each as there are products, in any order.
    const float rounding = kRounding * (1.1f * depth + width + 16);
    Queries asked(kernel, queries, visible, count, width, depth);
    Panel panel(kernel, width, depth);
    Candidates found(keys, queries, count, k, *kernel.selection);
    alignas(64) float scores[kTile * kTile];
    alignas(64) char saved[64];
    uint32_t masks[kTile];
    float errors[kTile], limits[kTile];

    const auto scan = [&](Queries::Group& group, int64_t b, int64_t begin) {
        set_limits(group.lengths, panel.longest[b], group.fine, rounding, found.best() + group.begin, errors, limits);
        kernel.multiply(asked.packed(group), panel.packed(b, group.fine), depth, scores);
        for (uint32_t some = kernel.selection->compare(scores, limits, masks); some; some &= some - 1) {
            const int64_t q = __builtin_ctz(some), at = group.begin + q;
            uint32_t mask = masks[q];
            if (begin + kTile > group.all_see) mask &= first_bits(at < count ? visible[at] - begin : 0);
            if (mask) group.fine |= found.add(at, scores + q * kTile, errors[q], static_cast<int32_t>(begin), mask);
        }
    };

    if (kernel.begin) kernel.begin(saved);
    // From the last key on: the nearest of a text's keys are late ones more often than not.
    constexpr int64_t kKeys = kPanel * kTile;
    for (int64_t first = (asked.end + kKeys - 1) / kKeys * kKeys - kKeys; first >= 0; first -= kKeys) {
        panel.fill(keys, first, asked.end);
        for (Queries::Group& group : asked.groups)
            for (int64_t b = panel.count - 1; b >= 0; --b)
                if (first + b * kTile < group.some_see) scan(group, b, first + b * kTile);
    }
    if (kernel.end) kernel.end(saved);
    for (int64_t i = 0; i < count; ++i) found.finish(i, ids + i * k);
    return found.ranked();
}

}  // namespace rag
