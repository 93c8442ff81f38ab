// Best-first search in an attention-aware graph, one query at a time or several in turns.
#pragma once
#include <cstdint>
#include <deque>
#include <vector>

#include "links.h"
#include "rows.h"

namespace rag {

struct Graph {
    Rows keys;  // that the search walks by
    Links links;
    const int32_t* entries;  // [num_entries], -1 pads at the end
    int64_t num_entries;
    Rows exact = {};  // keys that the beam is ranked by in the end; without data: those it walks by
};

// Where the searches of a kv head start beside the entries: keys ids [group, width] that its query heads found before, best
// first, -1 pads at the end, `stride` ids apart. Each starts from those of all; and from the keys after the first kFollowed
// of its own, since what is copied from the text is wanted step by step.
struct Starts {
    const int32_t* ids;
    int64_t group, width, stride;
};
constexpr int64_t kFollowed = 20;

// One query's search with a beam of the `width` best keys met. After `start`, `step` until it says false, then `finish`.
// Between two steps the rows that the next one reads are on their way from memory: several searches of one thread that
// step in turns wait less. Buffers are reused over queries: nothing is allocated or cleared per query.
class BeamSearch {
   public:
    // Starts as query head `own`. graph and query must outlive the search.
    void start(const Graph& graph, const float* query, int64_t width, const Starts& starts, int64_t own);
    bool step();
    // Goes on for another query, when `step` has said false: scores what was met anew and keeps the `width` best. What was
    // expanded is not expanded again, since all that its links name was met. `step` on until it says false.
    void turn_to(const float* query, int64_t width);
    // ids, scores [k], best first, -1 / -inf pads; scores may be null. Returns the number of inner products computed.
    int64_t finish(int64_t k, int32_t* ids, float* scores);

   private:
    template <class Each>
    void gather(Each&& each);
    void hold(int64_t batch);
    void absorb();
    void insert(uint64_t candidate);
    void rank_exactly();

    const Graph* graph_ = nullptr;
    const float* query_ = nullptr;
    int32_t expanding_ = -1;  // the key whose links come next
    int64_t width_ = 0, filled_ = 0, next_ = 0, fresh_count_ = 0, scored_ = 0;
    std::vector<uint8_t> seen_;  // epoch_ where a key was met, one more where it was expanded
    uint8_t epoch_ = 0;          // even
    std::vector<uint64_t> beam_, good_;  // best first; those that may enter it
    std::vector<int32_t> fresh_, met_;   // keys not scored yet; all keys met
    int64_t met_count_ = 0;
    std::vector<float> scores_;
};

// `step`s the `count` searches in turns until all say false; `going` is used up.
void take_turns(BeamSearch** going, int64_t count);

// So many are let take turns.
constexpr int64_t kTurns = 8;
// `count` searches of the calling thread, or more, the same ones in every call.
std::deque<BeamSearch>& searches_of_thread(int64_t count);

// Each id of ids [width] once, plus `first`, in the order met, then -1 pads: out [width]. Negative ids are pads. Returns
// how many there are.
int64_t unite(const int32_t* ids, int64_t width, int64_t first, int32_t* out);

}  // namespace rag
