#include "co_occurrence.h"

#include <algorithm>
#include <cstdlib>

namespace rag {
namespace {

constexpr int64_t kOne = 1 << 16;

// A number in [0, kOne).
int64_t chance(int64_t key, int64_t sample) {
    uint32_t mixed = static_cast<uint32_t>(key) * 2654435761u + static_cast<uint32_t>(sample) * 2246822519u;
    mixed = (mixed ^ mixed >> 15) * 2246822519u;
    return (mixed ^ mixed >> 13) >> 16;
}

// The number, in the order of the text, of the list at which sample i of a key looks back.
int64_t due(int64_t key, int64_t sample, int64_t sampled, int64_t first, int64_t last) {
    const int64_t u = (sample * kOne + chance(key, sample)) / sampled;
    return last - ((last - first) * (u * u / kOne)) / kOne;
}

}  // namespace

Occurrences::Occurrences(const Lists& lists, int64_t queries, int64_t n, int64_t sampled, bool in_step)
    : places_(n * kLatestLists, {-1, 0}), samples_(n * sampled, -1), sampled_(sampled) {
    const int64_t group = queries ? lists.count / queries : 0, last = lists.count - 1;
    std::vector<uint8_t> known(n, 0), filled(n, 0);
    std::vector<int64_t> next(n, -1);
    const auto after = [&](int64_t key) {
        if (filled[key] < sampled)
            next[key] = due(key, filled[key], sampled, in_step ? key * lists.count / n : 0, last);
        else
            next[key] = -1;
    };
    for (int64_t key = 0; key < n; ++key) after(key);
    for (int64_t number = last; number >= 0; --number) {
        const auto list = static_cast<int32_t>(number % group * queries + number / group);
        const int32_t* ids = lists.row(list);
        for (int64_t rank = 0; rank < lists.width && ids[rank] >= 0; ++rank) {
            const int32_t key = ids[rank];
            if (known[key] < kLatestLists) places_[key * kLatestLists + known[key]++] = {list, static_cast<int32_t>(rank)};
            while (next[key] >= number) samples_[key * sampled + filled[key]++] = list, after(key);
        }
    }
}

int64_t link_by_queries(const Lists& lists, const Occurrences& occurrences, int32_t x, int64_t width, int64_t pivots,
                        const int32_t* names, const std::vector<int32_t>& earlier, PruneScratch& s, int32_t* out) {
    std::vector<int32_t>& candidates = s.candidates;
    candidates.clear();
    const Occurrences::Place* places = occurrences.latest(x);
    for (int64_t i = 0; i < kLatestLists && places[i].list >= 0; ++i) {
        const int32_t* ids = lists.row(places[i].list);
        for (int64_t rank = 0; rank < lists.width && ids[rank] >= 0; ++rank) {
            if (ids[rank] == x) continue;
            uint32_t& weight = s.weights[ids[rank]];
            if (weight == 0) candidates.push_back(ids[rank]);
            weight += 131072 / (2 + std::abs(rank - places[i].rank)) + lists.width - rank;
        }
    }
    const int64_t kept = std::min<int64_t>(width, candidates.size());
    std::partial_sort(candidates.begin(), candidates.begin() + kept, candidates.end(), [&](int32_t a, int32_t b) {
        return s.weights[a] != s.weights[b] ? s.weights[a] > s.weights[b] : a < b;
    });
    for (const int32_t id : candidates) s.weights[id] = 0;

    int64_t filled = 0;
    const auto take = [&](int32_t id) {
        if (filled < width && std::find(out, out + filled, id) == out + filled) out[filled++] = id;
    };
    const auto name = [&](int32_t id) { return names ? names[id] : id; };
    const int64_t near = std::min(kept, (width + 1) / 2);
    for (int64_t i = 0; i < near; ++i) take(name(candidates[i]));
    const int32_t* samples = occurrences.samples(x);
    for (int64_t i = 0; i < pivots && samples[i] >= 0; ++i) {
        const int32_t* ids = lists.row(samples[i]);
        const int64_t rank = ids[0] == x;
        if (rank < lists.width && ids[rank] >= 0) take(name(ids[rank]));
    }
    const size_t half = std::min<size_t>((width + 1) / 2, earlier.size());
    std::for_each(earlier.begin() + half, earlier.end(), take);
    std::for_each(earlier.begin(), earlier.begin() + half, take);
    for (int64_t i = near; i < kept; ++i) take(name(candidates[i]));
    std::fill(out + filled, out + width, -1);
    return filled;
}

}  // namespace rag
