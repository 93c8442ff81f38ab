// Lists by key, of few keys among many.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace rag {

// Members of keys, ascending. Add all, sort once, then read.
class Members {
   public:
    using Pair = std::pair<int32_t, int32_t>;

    void add(int32_t key, int32_t member) { pairs_.emplace_back(key, member); }
    void sort() { std::sort(pairs_.begin(), pairs_.end()); }
    template <class Visit>
    void each(int32_t key, Visit&& visit) const {
        for (auto i = std::lower_bound(pairs_.begin(), pairs_.end(), Pair{key, -1}); i != pairs_.end() && i->first == key; ++i)
            visit(i->second);
    }
    void keys(std::vector<int32_t>& out) const {
        for (const Pair& pair : pairs_) out.push_back(pair.first);
    }

   private:
    std::vector<Pair> pairs_;
};

}  // namespace rag
