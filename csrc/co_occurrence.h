// Links between keys that the same queries want.
#pragma once
#include <cstdint>
#include <vector>

#include "graph.h"

namespace rag {

constexpr int64_t kLatestLists = 3;

// For every key the latest lists that name it. Lists come query head by query head, `queries` of each in the order of
// the text; of one position, those of a later head count as later.
class Occurrences {
   public:
    Occurrences(const Lists& lists, int64_t queries, int64_t n);

    // A list that names a key, and at which rank; `list` < 0: none.
    struct Place {
        int32_t list, rank;
    };
    // [kLatestLists], latest first.
    const Place* of(int64_t key) const { return places_.data() + key * kLatestLists; }

   private:
    std::vector<Place> places_;
};

// The keys that stand nearest to x in the latest lists that name it: each list adds to the weight of its member of rank j,
// where x has rank r, 131072 / (2 + |j - r|) + width - j, in whole numbers. Greatest weight first, equal ones by id;
// out [width], -1 pads. `weights` [n] is 0 before and after.
void co_occurring(const Lists& lists, const Occurrences& occurrences, int64_t x, int64_t width,
                  std::vector<uint32_t>& weights, std::vector<int32_t>& candidates, int32_t* out);

}  // namespace rag
