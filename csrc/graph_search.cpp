#include "graph_search.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

namespace rag {
namespace {

// A beam entry is one number, greater if nearer: the score's order, then the smaller id, then whether it waits for its
// expansion. Ids differ, so the last bit decides nothing.
constexpr uint32_t kIdBits = 0x7fffffffu;

uint64_t entry(float score, int32_t id) {
    score += 0.f;  // -0 becomes 0
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    const uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(order) << 32 | (kIdBits - static_cast<uint32_t>(id)) << 1 | 1u;
}
int32_t id_of(uint64_t e) { return static_cast<int32_t>(kIdBits - (static_cast<uint32_t>(e) >> 1)); }
bool waits(uint64_t e) { return e & 1u; }
float score_of(uint64_t e) {
    const auto order = static_cast<uint32_t>(e >> 32);
    const uint32_t bits = order & 0x80000000u ? order & 0x7fffffffu : ~order;
    float score;
    std::memcpy(&score, &bits, 4);
    return score;
}

}  // namespace

void BeamSearch::start(const Graph& graph, const float* query, int64_t width, const Starts& starts, int64_t own) {
    graph_ = &graph;
    query_ = query;
    const int64_t n = graph.keys.n, followed = std::min(starts.width, kFollowed);
    width_ = std::min(width, n);
    if (static_cast<int64_t>(seen_.size()) < n) seen_.assign(n, 0), epoch_ = 0;
    if ((epoch_ += 2) == 0) std::fill(seen_.begin(), seen_.end(), 0), epoch_ = 2;
    if (static_cast<int64_t>(beam_.size()) < width_ + 1) beam_.resize(width_ + 1);
    hold(std::max(graph.links.slots, starts.group * starts.width + followed + graph.num_entries));
    filled_ = next_ = fresh_count_ = scored_ = met_count_ = 0;
    expanding_ = -1;
    gather([&](auto&& meet) {
        for (int64_t head = 0; head < starts.group; ++head) {
            const int32_t* ids = starts.ids + head * starts.stride;
            for (int64_t i = 0; i < starts.width && ids[i] >= 0; ++i) {
                meet(ids[i]);
                if (head == own && i < followed && ids[i] + 1 < n) meet(ids[i] + 1);
            }
        }
        for (int64_t i = 0; i < graph.num_entries && graph.entries[i] >= 0; ++i) meet(graph.entries[i]);
    });
}

// Room for `batch` keys scored at a time.
void BeamSearch::hold(int64_t batch) {
    if (static_cast<int64_t>(scores_.size()) < batch) fresh_.resize(batch + 1), scores_.resize(batch), good_.resize(batch + 1);
}

// Lists the keys that `each` names and that were not met before.
template <class Each>
void BeamSearch::gather(Each&& each) {
    int32_t* fresh = fresh_.data();
    uint8_t* seen = seen_.data();
    const uint8_t epoch = epoch_;
    int64_t count = 0;
    // A branch here would often be guessed wrong: a key met before is written, and then overwritten.
    each([&](int32_t id) {
        fresh[count] = id;
        count += seen[id] < epoch;
        seen[id] = std::max(seen[id], epoch);
    });
    for (int64_t i = 0; i < count; ++i) graph_->keys.prefetch(fresh[i]);
    fresh_count_ = count;
    if (static_cast<int64_t>(met_.size()) < met_count_ + count) met_.resize(2 * (met_count_ + count));
    std::copy_n(fresh, count, met_.data() + met_count_);
    met_count_ += count;
}

bool BeamSearch::step() {
    if (expanding_ >= 0) {
        gather([this](auto&& meet) { graph_->links.each(expanding_, meet); });
        expanding_ = -1;
        return true;
    }
    absorb();
    for (; next_ < filled_; ++next_)
        if (waits(beam_[next_])) break;
    if (next_ == filled_) return false;
    beam_[next_] &= ~uint64_t{1};
    expanding_ = id_of(beam_[next_]);
    seen_[expanding_] = epoch_ + 1;
    graph_->links.prefetch(expanding_);
    for (int64_t later = next_ + 1; later < filled_; ++later)
        if (waits(beam_[later])) {
            graph_->links.prefetch(id_of(beam_[later]));
            break;
        }
    return true;
}

void BeamSearch::absorb() {
    graph_->keys.score(query_, fresh_.data(), fresh_count_, scores_.data());
    scored_ += fresh_count_;
    const uint64_t least = filled_ == width_ ? beam_[filled_ - 1] : 0;
    uint64_t* good = good_.data();
    int64_t count = 0;
    for (int64_t i = 0; i < fresh_count_; ++i) {
        good[count] = entry(scores_[i], fresh_[i]);
        count += good[count] > least;
    }
    for (int64_t i = 0; i < count; ++i) insert(good[i]);
}

void BeamSearch::insert(uint64_t candidate) {
    uint64_t* beam = beam_.data();
    if (filled_ == width_ && candidate < beam[filled_ - 1]) return;
    // Its place, by halving without branches.
    const uint64_t* from = beam;
    for (int64_t length = filled_; length > 1;) {
        const int64_t half = length / 2;
        from += (from[half - 1] > candidate) * half;
        length -= half;
    }
    const int64_t at = from - beam + (filled_ > 0 && *from > candidate), last = std::min(filled_, width_ - 1);
    std::memmove(beam + at + 1, beam + at, (last - at) * sizeof(uint64_t));
    beam[at] = candidate;
    filled_ = last + 1;
    next_ = std::min(next_, at);
}

void BeamSearch::turn_to(const float* query, int64_t width) {
    query_ = query;
    width_ = std::min(width, graph_->keys.n);
    if (static_cast<int64_t>(beam_.size()) < width_ + 1) beam_.resize(width_ + 1);
    hold(met_count_);
    graph_->keys.score(query_, met_.data(), met_count_, scores_.data());
    scored_ += met_count_;
    uint64_t* good = good_.data();
    for (int64_t i = 0; i < met_count_; ++i) {
        const uint64_t expanded = seen_[met_[i]] & 1u;
        good[i] = entry(scores_[i], met_[i]) ^ expanded;
    }
    filled_ = std::min(width_, met_count_);
    if (filled_ < met_count_) std::nth_element(good, good + filled_, good + met_count_, std::greater<>());
    std::sort(good, good + filled_, std::greater<>());
    std::copy_n(good, filled_, beam_.data());
    next_ = fresh_count_ = 0;
    expanding_ = -1;
}

// Scores the whole beam anew: what a compact copy puts too low is still near the k best.
void BeamSearch::rank_exactly() {
    hold(filled_);
    for (int64_t i = 0; i < filled_; ++i) fresh_[i] = id_of(beam_[i]);
    graph_->exact.score(query_, fresh_.data(), filled_, scores_.data());
    scored_ += filled_;
    for (int64_t i = 0; i < filled_; ++i) beam_[i] = entry(scores_[i], fresh_[i]);
    std::sort(beam_.begin(), beam_.begin() + filled_, std::greater<>());
}

int64_t BeamSearch::finish(int64_t k, int32_t* ids, float* scores) {
    if (graph_->exact.data) rank_exactly();
    for (int64_t i = 0; i < k; ++i) {
        ids[i] = i < filled_ ? id_of(beam_[i]) : -1;
        if (scores) scores[i] = i < filled_ ? score_of(beam_[i]) : -std::numeric_limits<float>::infinity();
    }
    return scored_;
}

void take_turns(BeamSearch** going, int64_t count) {
    while (count) {
        int64_t on = 0;
        for (int64_t i = 0; i < count; ++i)
            if (going[i]->step()) going[on++] = going[i];
        count = on;
    }
}

std::deque<BeamSearch>& searches_of_thread(int64_t count) {
    thread_local std::deque<BeamSearch> searches;
    while (static_cast<int64_t>(searches.size()) < count) searches.emplace_back();
    return searches;
}

int64_t unite(const int32_t* ids, int64_t width, int64_t first, int32_t* out) {
    // An open hash table at most half full.
    thread_local std::vector<int32_t> table;
    int64_t slots = 2;
    while (slots < 2 * width) slots *= 2;
    table.assign(slots, -1);
    int64_t count = 0;
    for (int64_t i = 0; i < width; ++i) {
        if (ids[i] < 0) continue;
        int64_t slot = (static_cast<uint32_t>(ids[i]) * 2654435769u) & (slots - 1);
        while (table[slot] >= 0 && table[slot] != ids[i]) slot = (slot + 1) & (slots - 1);
        if (table[slot] == ids[i]) continue;
        table[slot] = ids[i];
        out[count++] = ids[i] + static_cast<int32_t>(first);
    }
    std::fill(out + count, out + width, -1);
    return count;
}

}  // namespace rag
