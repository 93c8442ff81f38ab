#include "co_occurrence.h"

#include <algorithm>
#include <cstdlib>

namespace rag {

Occurrences::Occurrences(const Lists& lists, int64_t queries, int64_t n) : places_(n * kLatestLists, {-1, 0}) {
    std::vector<uint8_t> known(n, 0);
    const int64_t group = queries ? lists.count / queries : 0;
    for (int64_t m = queries - 1; m >= 0; --m)
        for (int64_t head = group - 1; head >= 0; --head) {
            const int64_t list = head * queries + m;
            const int32_t* ids = lists.row(list);
            for (int64_t rank = 0; rank < lists.width && ids[rank] >= 0; ++rank) {
                uint8_t& count = known[ids[rank]];
                if (count == kLatestLists) continue;
                places_[ids[rank] * kLatestLists + count++] = {static_cast<int32_t>(list), static_cast<int32_t>(rank)};
            }
        }
}

void co_occurring(const Lists& lists, const Occurrences& occurrences, int64_t x, int64_t width,
                  std::vector<uint32_t>& weights, std::vector<int32_t>& candidates, int32_t* out) {
    candidates.clear();
    const Occurrences::Place* places = occurrences.of(x);
    for (int64_t i = 0; i < kLatestLists && places[i].list >= 0; ++i) {
        const int32_t* ids = lists.row(places[i].list);
        for (int64_t rank = 0; rank < lists.width && ids[rank] >= 0; ++rank) {
            if (ids[rank] == x) continue;
            uint32_t& weight = weights[ids[rank]];
            if (weight == 0) candidates.push_back(ids[rank]);
            weight += 131072 / (2 + std::abs(rank - places[i].rank)) + lists.width - rank;
        }
    }
    const int64_t kept = std::min<int64_t>(width, candidates.size());
    std::partial_sort(candidates.begin(), candidates.begin() + kept, candidates.end(), [&](int32_t a, int32_t b) {
        return weights[a] != weights[b] ? weights[a] > weights[b] : a < b;
    });
    std::copy(candidates.begin(), candidates.begin() + kept, out);
    std::fill(out + kept, out + width, -1);
    for (const int32_t id : candidates) weights[id] = 0;
}

}  // namespace rag
