// Repair of what a graph's entries do not reach.
#pragma once
#include <cstdint>
#include <vector>

namespace rag {

// Walks the graph from the entries and gives every key not met a link from a near key that was. The links of the walk
// (one into every key met) are never given up, so nothing that is reachable gets lost.
class Reachability {
   public:
    Reachability(int32_t* adjacency, int64_t n, int64_t degree)
        : adjacency_(adjacency), n_(n), degree_(degree), met_(n, 0), walked_(n * degree, 0) {}

    int64_t repair(const int32_t* entries, int64_t num_entries) {
        for (int64_t i = 0; i < num_entries && entries[i] >= 0; ++i) walk_from(entries[i]);
        int64_t repaired = 0;
        for (int64_t x = 0; x < n_; ++x) {
            if (met_[x]) continue;
            attach(static_cast<int32_t>(x));
            walk_from(static_cast<int32_t>(x));
            ++repaired;
        }
        return repaired;
    }

   private:
    void walk_from(int32_t start) {
        if (met_[start]) return;
        met_[start] = 1;
        queue_.assign(1, start);
        for (size_t head = 0; head < queue_.size(); ++head) {
            const int64_t base = queue_[head] * degree_;
            for (int64_t j = 0; j < degree_ && adjacency_[base + j] >= 0; ++j) {
                const int32_t y = adjacency_[base + j];
                if (met_[y]) continue;
                met_[y] = 1;
                walked_[base + j] = 1;
                queue_.push_back(y);
            }
        }
    }
    bool link(int32_t from, int32_t to) {
        const int64_t base = from * degree_;
        int64_t slot = -1;
        for (int64_t j = 0; j < degree_; ++j) {
            if (adjacency_[base + j] < 0) {
                slot = j;
                break;
            }
            if (!walked_[base + j]) slot = j;
        }
        if (slot < 0) return false;
        adjacency_[base + slot] = to;
        walked_[base + slot] = 1;
        return true;
    }
    // From one of its own neighbours, else from the nearest position in the text that has room; some key always has:
    // the walk keeps fewer links than there are keys met.
    void attach(int32_t x) {
        for (int64_t j = 0; j < degree_; ++j) {
            const int32_t y = adjacency_[x * degree_ + j];
            if (y < 0) break;
            if (met_[y] && link(y, x)) return;
        }
        for (int64_t step = 1; step < n_; ++step) {
            if (x - step >= 0 && met_[x - step] && link(static_cast<int32_t>(x - step), x)) return;
            if (x + step < n_ && met_[x + step] && link(static_cast<int32_t>(x + step), x)) return;
        }
    }

    int32_t* adjacency_;
    int64_t n_, degree_;
    std::vector<uint8_t> met_, walked_;
    std::vector<int32_t> queue_;
};

}  // namespace rag
