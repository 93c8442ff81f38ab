// Links between keys that the same queries want.
#pragma once
#include <cstdint>
#include <vector>

#include "graph.h"
#include "prune.h"

namespace rag {

constexpr int64_t kLatestLists = 3;

// Lists come query head by query head, `queries` of each in the order of the text; of one position, those of a later head
// count as later. For every key the latest lists that name it, and `sampled` of all lists that name it, the late ones more
// densely: of keys that very many queries want, different ones meet different queries.
class Occurrences {
   public:
    // `in_step`: a key comes into the text where as large a part of the lists is behind.
    Occurrences(const Lists& lists, int64_t queries, int64_t n, int64_t sampled, bool in_step);

    // A list that names a key, and at which rank; `list` < 0: none.
    struct Place {
        int32_t list, rank;
    };
    // [kLatestLists], latest first.
    const Place* latest(int64_t key) const { return places_.data() + key * kLatestLists; }
    // [sampled()] lists, latest first, -1 pads: sample i of them is the latest one not after list number
    // last - (last - first) * u * u, u = (i + chance) / sampled, a different chance for each key and i.
    const int32_t* samples(int64_t key) const { return samples_.data() + key * sampled_; }
    int64_t sampled() const { return sampled_; }

   private:
    std::vector<Place> places_;
    std::vector<int32_t> samples_;
    int64_t sampled_;
};

// Links of key x of the lists: half of `width` to the keys that stand nearest to it in the latest lists that name it; then
// to what its first `pivots` samples rank first, or second where that is x itself; to `earlier` ones, those of its second
// half first; and to more of the first kind. In the first kind each list adds to the weight of its member of rank j, where
// x has rank r, 131072 / (2 + |j - r|) + width of the list - j, in whole numbers; greatest weight first, equal ones by id.
// Where `names` is not null the lists name places in it, and out and `earlier` what stands there. Returns how many are in
// out [width], -1 pads.
int64_t link_by_queries(const Lists& lists, const Occurrences& occurrences, int32_t x, int64_t width, int64_t pivots,
                        const int32_t* names, const std::vector<int32_t>& earlier, PruneScratch& s, int32_t* out);

}  // namespace rag
