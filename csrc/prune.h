// Which of its candidates a key links to.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "graph.h"

namespace rag {

// Candidates of one key without repetition, and the buffers to prune them: nothing is allocated or cleared per key.
class PruneScratch {
   public:
    std::vector<Neighbour> sorted;
    std::vector<int32_t> candidates, rejected;
    std::vector<float> pivot, kept_rows, scores;
    std::vector<uint32_t> weights;  // of link_by_queries: 0 before and after

    void begin(int32_t x, int64_t n) {
        candidates.clear();
        if (static_cast<int64_t>(named_.size()) < n) named_.assign(n, 0), epoch_ = 0;
        if (++epoch_ == 0) std::fill(named_.begin(), named_.end(), 0), epoch_ = 1;
        named_[x] = epoch_;
    }
    void add(int32_t id) {
        if (named_[id] == epoch_) return;
        named_[id] = epoch_;
        candidates.push_back(id);
    }

   private:
    std::vector<uint32_t> named_;
    uint32_t epoch_ = 0;
};

// RoarGraph's occlusion rule under the inner product, filling up: keeps p unless a kept r has <p, r> > <x, p>, then the
// best rejected ones until the list is full. out: [width], -1 pads.
void prune_fill(const Rows& keys, int32_t x, int64_t width, PruneScratch& s, int32_t* out);

}  // namespace rag
