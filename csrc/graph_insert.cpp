#include "graph_insert.h"

#include <algorithm>
#include <iterator>
#include <memory>

#include "co_occurrence.h"
#include "members.h"
#include "prune.h"
#include "reachability.h"

namespace rag {
namespace {

constexpr int64_t kQueriesPerTask = 64;
constexpr int64_t kKeysPerTask = 16;

struct Scratch {
    PruneScratch prune;
    std::vector<Neighbour> near;
    std::vector<int32_t> ids, asked, earlier, out;  // s.ids: nearest keys of the key that is linked, nearest first
    std::vector<float> scores, centred, towards;
};

void sort_unique(std::vector<int32_t>& ids) {
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
}

float dot(const float* a, const float* b, int64_t dim) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < dim; ++d) sum += a[d] * b[d];
    return sum;
}

// The stages of one kv head. Each reads what the stages before have finished, and writes what belongs to its key.
class HeadInsert {
   public:
    HeadInsert(const HeadGrowth& input, const BuildOptions& options, int64_t group, int64_t list_width)
        : in_(input), options_(options), group_(group), list_width_(list_width), fresh_(in_.keys.n - in_.before),
          width_(in_.keys.width()), key_links_(options.degree - options.query_links),
          near_width_(key_links_ ? options.degree : 0), near_(fresh_ * near_width_) {}

    int64_t fresh() const { return fresh_; }
    int64_t pivots() const { return pivots_.size(); }
    int64_t affected() const { return affected_.size(); }

    // Adds the new keys to the lists of some queries.
    void extend(int64_t head, int64_t begin, int64_t end, const int64_t* visible) {
        const int64_t first = head * options_.queries + begin;
        extend_lists(in_.keys, in_.queries + first * width_, visible + begin, end - begin, in_.before, list_width_,
                     in_.lists + first * list_width_, in_.list_scores + first * list_width_);
    }
    // The nearest of new key i: of the candidates among the old ones and of all new ones.
    void find_near(int64_t i, Scratch& s) {
        if (!near_width_) return;
        const int32_t* old = in_.near.row(i);
        s.asked.assign(old, std::find(old, old + in_.near.width, -1));
        for (int64_t j = in_.before; j < in_.keys.n; ++j)
            if (j != in_.before + i) s.asked.push_back(static_cast<int32_t>(j));
        by_nearness_to(in_.before + i, s);
        int32_t* out = &near_[i * near_width_];
        for (int64_t j = 0; j < near_width_; ++j) out[j] = j < static_cast<int64_t>(s.near.size()) ? s.near[j].id : -1;
    }
    void group() {
        const std::vector<int32_t> earlier(in_.entries, std::find(in_.entries, in_.entries + options_.num_entries, -1));
        choose_entries({in_.lists, lists(), list_width_}, options_.queries, in_.keys.n, earlier, options_.num_entries,
                       in_.entries);
        if (options_.co_occurrence) {
            name_keys();
            return;
        }
        for (int64_t i = 0; i < lists(); ++i)
            if (pivot(i) >= 0) by_pivot_.add(pivot(i), static_cast<int32_t>(i)), pivots_.push_back(pivot(i));
        by_pivot_.sort();
        sort_unique(pivots_);
        forward_.assign(pivots_.size() * options_.query_links, -1);
    }
    void link_pivot(int64_t at, Scratch& s) {
        s.prune.begin(pivots_[at], in_.keys.n);
        by_pivot_.each(pivots_[at], [&](int32_t i) {
            const int32_t* list = in_.lists + i * list_width_;
            for (int64_t j = 1; j < list_width_ && list[j] >= 0; ++j) s.prune.add(list[j]);
        });
        prune_fill(in_.keys, pivots_[at], options_.query_links, s.prune, forward_.data() + at * options_.query_links);
    }
    // Who gets links: by queries in both directions, by nearness the old ones that new keys are near to.
    void reverse() {
        for (size_t at = 0; at < pivots_.size(); ++at)
            for (int64_t j = 0; j < options_.query_links; ++j)
                if (const int32_t y = forward_[at * options_.query_links + j]; y >= 0)
                    by_query_.add(pivots_[at], y), by_query_.add(y, pivots_[at]);
        for (int64_t i = 0; i < fresh_; ++i)
            for (int64_t j = 0; j < std::min(near_width_, key_links_); ++j)
                if (const int32_t y = near_[i * near_width_ + j]; y >= 0 && y < in_.before)
                    by_nearness_.add(y, static_cast<int32_t>(in_.before + i));
        by_query_.sort();
        by_nearness_.sort();
        by_query_.keys(affected_);
        affected_.insert(affected_.end(), named_.begin(), named_.end());
        by_nearness_.keys(affected_);
        for (int64_t x = in_.before; x < in_.keys.n; ++x) affected_.push_back(static_cast<int32_t>(x));
        sort_unique(affected_);
    }
    void link(int64_t at, Scratch& s) {
        const int32_t y = affected_[at];
        s.out.resize(options_.degree);
        int32_t* out = s.out.data();
        s.earlier.clear();
        if (y < in_.before)
            reconsider(y, s);
        else
            s.ids.assign(near_.data() + (y - in_.before) * near_width_, near_.data() + (y - in_.before + 1) * near_width_);
        int64_t filled = options_.co_occurrence ? link_co_occurring(y, s) : link_proposed(y, s);
        for (size_t j = 0; j < s.ids.size() && s.ids[j] >= 0 && filled < options_.degree; ++j)
            if (std::find(out, out + filled, s.ids[j]) == out + filled) out[filled++] = s.ids[j];
        std::fill(out + filled, out + options_.degree, -1);
        write_row(in_.links, y, out, options_.degree);
    }
    // Hardly ever is a key cut off: only then all links are unpacked.
    int64_t repair() {
        if (all_reachable()) return 0;
        const int64_t n = in_.keys.n, degree = options_.degree;
        std::vector<int32_t> adjacency(n * degree, -1);
        for (int64_t i = 0; i < n; ++i)
            in_.links.each(i, [to = adjacency.data() + i * degree](int32_t id) mutable { *to++ = id; });
        const int64_t repaired = Reachability(adjacency.data(), n, degree).repair(in_.entries, options_.num_entries);
        for (int64_t i = 0; i < n; ++i) write_row(in_.links, i, adjacency.data() + i * degree, degree);
        return repaired;
    }

   private:
    int64_t lists() const { return group_ * options_.queries; }
    int32_t pivot(int64_t list) const { return in_.lists[list * list_width_]; }

    // RoarGraph's: what queries propose competes with the links that earlier ones made. Returns how many are in s.out.
    int64_t link_proposed(int32_t y, Scratch& s) {
        s.prune.begin(y, in_.keys.n);
        by_query_.each(y, [&](int32_t x) { s.prune.add(x); });
        for (int32_t x : s.earlier) s.prune.add(x);
        prune_fill(in_.keys, y, options_.query_links, s.prune, s.out.data());
        return std::find(s.out.begin(), s.out.begin() + options_.query_links, -1) - s.out.begin();
    }
    // Those of the lists; an old key gets one new pivot and keeps earlier links as far as there is room.
    int64_t link_co_occurring(int32_t y, Scratch& s) {
        const int64_t most = options_.query_links, local = place_of(y);
        if (local < 0) {
            const int64_t kept = std::min<int64_t>(most, s.earlier.size());
            std::copy_n(s.earlier.begin(), kept, s.out.begin());
            return kept;
        }
        if (s.prune.weights.size() < named_.size()) s.prune.weights.resize(named_.size(), 0);
        const int64_t pivots = y < in_.before ? std::min<int64_t>(occurrences_->sampled(), 1) : occurrences_->sampled();
        return link_by_queries(named_lists(), *occurrences_, static_cast<int32_t>(local), most, pivots, named_.data(),
                               s.earlier, s.prune, s.out.data());
    }
    // The lists by places among the keys that they name, ascending: memory for these, not for all keys.
    void name_keys() {
        const int32_t *begin = in_.lists, *end = begin + lists() * list_width_;
        std::copy_if(begin, end, std::back_inserter(named_), [](int32_t id) { return id >= 0; });
        sort_unique(named_);
        local_.reserve(lists() * list_width_);
        for (const int32_t* id = begin; id < end; ++id) local_.push_back(place_of(*id));
        occurrences_ = std::make_unique<Occurrences>(named_lists(), options_.queries, named_.size(), options_.query_links / 2,
                                                     false);
    }
    Lists named_lists() const { return {local_.data(), lists(), list_width_}; }
    int32_t place_of(int32_t id) const {
        const auto at = std::lower_bound(named_.begin(), named_.end(), id);
        return at != named_.end() && *at == id ? static_cast<int32_t>(at - named_.begin()) : -1;
    }
    // s.near: the nearest to key x of s.asked, with their cosines in the metric, times the same number; near_width_ at
    // most, nearest first.
    void by_nearness_to(int64_t x, Scratch& s) const {
        s.centred.resize(width_);
        in_.keys.load(static_cast<int32_t>(x), s.centred.data());
        for (int64_t d = 0; d < width_; ++d) s.centred[d] -= in_.mean[d];
        s.towards = s.centred;
        if (in_.form) {
            std::fill(s.towards.begin(), s.towards.end(), 0.f);
            for (int64_t c = 0; c < width_; ++c) {
                const float* row = in_.form + c * width_;
                const float factor = s.centred[c];
#pragma omp simd
                for (int64_t d = 0; d < width_; ++d) s.towards[d] += factor * row[d];
            }
        }
        const float of_mean = dot(s.towards.data(), in_.mean, width_);
        s.scores.resize(s.asked.size());
        in_.keys.score(s.towards.data(), s.asked.data(), s.asked.size(), s.scores.data());
        s.near.clear();
        for (size_t i = 0; i < s.asked.size(); ++i)
            s.near.push_back({(s.scores[i] - of_mean) * in_.reciprocals[s.asked[i]], s.asked[i]});
        const int64_t count = std::min<int64_t>(near_width_, s.near.size());
        std::partial_sort(s.near.begin(), s.near.begin() + count, s.near.end(), nearer);
        s.near.resize(count);
    }
    // s.earlier: an old key's links by queries, in their order; s.ids: all its links, and new keys that are near to it,
    // nearest first. Links have no kind, but an order: those by queries come first, query_links at most; key links in
    // places that they left are taken for them. Where the layout has lost the order, all but the nearest key_links_ are.
    void reconsider(int32_t y, Scratch& s) {
        s.asked.clear();
        s.ids.clear();
        in_.links.each(y, [&](int32_t id) { s.asked.push_back(id); });
        const auto count = static_cast<int64_t>(s.asked.size());
        const bool ordered = in_.links.segments <= 1 || !near_width_;
        if (ordered) s.earlier.assign(s.asked.begin(), s.asked.begin() + std::min(count, options_.query_links));
        if (!near_width_) return;
        if (!ordered && count > key_links_) {
            by_nearness_to(y, s);
            for (int64_t i = key_links_; i < count; ++i) s.earlier.push_back(s.near[i].id);
        }
        by_nearness_.each(y, [&](int32_t id) { s.asked.push_back(id); });
        by_nearness_to(y, s);
        for (const Neighbour& one : s.near) s.ids.push_back(one.id);
    }
    bool all_reachable() const {
        std::vector<uint8_t> met(in_.keys.n, 0);
        std::vector<int32_t> queue;
        const auto meet = [&](int32_t id) {
            if (!met[id]) met[id] = 1, queue.push_back(id);
        };
        std::for_each(in_.entries, std::find(in_.entries, in_.entries + options_.num_entries, -1), meet);
        for (size_t head = 0; head < queue.size(); ++head) in_.links.each(queue[head], meet);
        return static_cast<int64_t>(queue.size()) == in_.keys.n;
    }
    HeadGrowth in_;
    BuildOptions options_;
    int64_t group_, list_width_, fresh_, width_, key_links_, near_width_;
    std::vector<int32_t> near_;                // [fresh, near width], -1 pads
    std::vector<int32_t> pivots_, forward_;    // ascending; their links [pivots, query links], -1 pads
    std::vector<int32_t> named_, local_;       // keys that lists name, ascending; the lists by places among these
    std::unique_ptr<Occurrences> occurrences_;
    std::vector<int32_t> affected_;            // ascending
    Members by_pivot_, by_query_, by_nearness_;  // lists of a pivot; keys proposed to a key
};

}  // namespace

int64_t insert_keys(const std::vector<HeadGrowth>& inputs, const BuildOptions& options, int64_t group, int64_t list_width,
                    const int64_t* visible, ThreadPool& pool) {
    std::vector<HeadInsert> heads;
    for (const HeadGrowth& input : inputs) heads.emplace_back(input, options, group, list_width);
    const int64_t count = heads.size();
    auto over_heads = [&](auto&& stage) { pool.parallel_for(count, 1, [&](int64_t h) { stage(heads[h]); }); };
    // stage(head, i) for every i below items(head)
    auto over_items = [&](auto&& items, int64_t chunk, auto&& stage) {
        int64_t most = 0;
        for (const HeadInsert& head : heads) most = std::max<int64_t>(most, items(head));
        pool.parallel_for(count * most, chunk, [&](int64_t i) {
            thread_local Scratch scratch;
            if (i % most < items(heads[i / most])) stage(heads[i / most], i % most, scratch);
        });
    };
    const int64_t parts = (options.queries + kQueriesPerTask - 1) / kQueriesPerTask;
    over_items([&](const HeadInsert&) { return group * parts; }, 1, [&](HeadInsert& head, int64_t i, Scratch&) {
        const int64_t begin = i % parts * kQueriesPerTask;
        head.extend(i / parts, begin, std::min(begin + kQueriesPerTask, options.queries), visible);
    });
    const auto fresh = [](const HeadInsert& head) { return head.fresh(); };
    over_items(fresh, kKeysPerTask, [](HeadInsert& head, int64_t i, Scratch& s) { head.find_near(i, s); });
    over_heads([](HeadInsert& head) { head.group(); });
    over_items([](const HeadInsert& head) { return head.pivots(); }, kKeysPerTask,
               [](HeadInsert& head, int64_t i, Scratch& s) { head.link_pivot(i, s); });
    over_heads([](HeadInsert& head) { head.reverse(); });
    over_items([](const HeadInsert& head) { return head.affected(); }, kKeysPerTask,
               [](HeadInsert& head, int64_t i, Scratch& s) { head.link(i, s); });
    std::atomic<int64_t> repaired{0};
    over_heads([&](HeadInsert& head) { repaired += head.repair(); });
    return repaired;
}

}  // namespace rag
