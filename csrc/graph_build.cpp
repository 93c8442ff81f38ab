#include <algorithm>
#include <memory>
#include <numeric>

#include "co_occurrence.h"
#include "graph.h"
#include "prune.h"
#include "reachability.h"

namespace rag {
namespace {

constexpr int64_t kNodesPerTask = 64;

// Compressed lists: the members of group i are members[begin[i] .. begin[i + 1]).
struct Groups {
    std::vector<int64_t> begin;
    std::vector<int32_t> members;
};

// Groups list indices by their pivot, the key ranked first.
Groups group_by_pivot(const Lists& lists, int64_t n) {
    Groups groups{std::vector<int64_t>(n + 1, 0), {}};
    for (int64_t i = 0; i < lists.count; ++i)
        if (lists.row(i)[0] >= 0) ++groups.begin[lists.row(i)[0] + 1];
    std::partial_sum(groups.begin.begin(), groups.begin.end(), groups.begin.begin());
    groups.members.resize(groups.begin[n]);
    std::vector<int64_t> at(groups.begin.begin(), groups.begin.end() - 1);
    for (int64_t i = 0; i < lists.count; ++i)
        if (lists.row(i)[0] >= 0) groups.members[at[lists.row(i)[0]]++] = static_cast<int32_t>(i);
    return groups;
}

// Turns links x -> y around: the members of group y are the keys x that link to it, ascending.
Groups reverse_links(const std::vector<int32_t>& links, int64_t n, int64_t width) {
    Groups groups{std::vector<int64_t>(n + 1, 0), {}};
    for (int32_t y : links)
        if (y >= 0) ++groups.begin[y + 1];
    std::partial_sum(groups.begin.begin(), groups.begin.end(), groups.begin.begin());
    groups.members.resize(groups.begin[n]);
    std::vector<int64_t> at(groups.begin.begin(), groups.begin.end() - 1);
    for (int64_t x = 0; x < n; ++x)
        for (int64_t j = 0; j < width; ++j)
            if (const int32_t y = links[x * width + j]; y >= 0) groups.members[at[y]++] = static_cast<int32_t>(x);
    return groups;
}

// The stages of one kv head's build. Each reads only what the stage before has finished: the graph is the same for any
// number of threads. Stages over nodes write only what belongs to their node.
class HeadBuild {
   public:
    HeadBuild(const HeadInput& input, const BuildOptions& options)
        : in_(input), options_(options), n_(input.keys.n), width_(options.query_links) {}

    void group() {
        if (options_.co_occurrence) {
            occurrences_ = std::make_unique<Occurrences>(in_.query_lists, options_.queries, n_, width_ / 2, true);
            return;
        }
        by_pivot_ = group_by_pivot(in_.query_lists, n_);
        forward_.assign(n_ * width_, -1);
    }
    // Links of a pivot: the union of the lists that name it first, pruned once.
    void link_pivot(int64_t x, PruneScratch& s) {
        if (by_pivot_.begin[x] == by_pivot_.begin[x + 1]) return;
        s.begin(static_cast<int32_t>(x), n_);
        for (int64_t i = by_pivot_.begin[x]; i < by_pivot_.begin[x + 1]; ++i) {
            const int32_t* list = in_.query_lists.row(by_pivot_.members[i]);
            for (int64_t j = 1; j < in_.query_lists.width && list[j] >= 0; ++j) s.add(list[j]);
        }
        prune_fill(in_.keys, static_cast<int32_t>(x), width_, s, forward_.data() + x * width_);
    }
    void reverse() { reverse_ = reverse_links(forward_, n_, width_); }
    // Query links of a key, then the nearest keys up to the degree.
    void link_all(int64_t y, PruneScratch& s) {
        int32_t* out = in_.adjacency + y * options_.degree;
        if (options_.co_occurrence) {
            if (static_cast<int64_t>(s.weights.size()) < n_) s.weights.resize(n_, 0);
            link_by_queries(in_.query_lists, *occurrences_, static_cast<int32_t>(y), width_, width_ / 2, nullptr, {}, s, out);
        } else {
            // The links of y as a pivot and their reverse, pruned again.
            s.begin(static_cast<int32_t>(y), n_);
            for (int64_t i = reverse_.begin[y]; i < reverse_.begin[y + 1]; ++i) s.add(reverse_.members[i]);
            for (int64_t j = 0; j < width_ && forward_[y * width_ + j] >= 0; ++j) s.add(forward_[y * width_ + j]);
            prune_fill(in_.keys, static_cast<int32_t>(y), width_, s, out);
        }
        int64_t filled = std::find(out, out + width_, -1) - out;
        const int32_t* near = in_.key_lists.row(y);
        for (int64_t j = 0; j < in_.key_lists.width && near[j] >= 0 && filled < options_.degree; ++j)
            if (near[j] != y && std::find(out, out + filled, near[j]) == out + filled) out[filled++] = near[j];
        std::fill(out + filled, out + options_.degree, -1);
    }
    int64_t nodes() const { return n_; }

   private:
    HeadInput in_;
    BuildOptions options_;
    int64_t n_, width_;
    std::unique_ptr<Occurrences> occurrences_;
    Groups by_pivot_, reverse_;
    std::vector<int32_t> forward_;
};

}  // namespace

void extend_lists(const Rows& keys, const float* queries, const int64_t* visible, int64_t count, int64_t begin,
                  int64_t k, int32_t* ids, float* scores) {
    std::vector<int32_t> fresh(count ? std::max<int64_t>(visible[count - 1] - begin, 0) : 0);
    std::vector<float> fresh_scores(fresh.size());
    std::iota(fresh.begin(), fresh.end(), static_cast<int32_t>(begin));
    for (int64_t i = 0; i < count; ++i, ids += k, scores += k) {
        const int64_t seen = std::max<int64_t>(visible[i] - begin, 0);
        keys.score(queries + i * keys.width(), fresh.data(), seen, fresh_scores.data());
        for (int64_t j = 0; j < seen; ++j) {
            if (!(fresh_scores[j] > scores[k - 1])) continue;
            int64_t at = k - 1;
            for (; at > 0 && scores[at - 1] < fresh_scores[j]; --at) {
                scores[at] = scores[at - 1];
                ids[at] = ids[at - 1];
            }
            scores[at] = fresh_scores[j];
            ids[at] = fresh[j];
        }
    }
}

void choose_entries(const Lists& lists, int64_t queries, int64_t n, const std::vector<int32_t>& earlier, int64_t num_entries,
                    int32_t* entries) {
    std::vector<uint8_t> chosen(n, 0);
    const int64_t group = queries ? lists.count / queries : 0, wanted = std::min(num_entries, n);
    int64_t filled = 0;
    const auto take = [&](int32_t id) {
        if (id >= 0 && filled < wanted && !chosen[id]) chosen[entries[filled++] = id] = 1;
    };
    for (int64_t number = lists.count - 1; number >= 0 && filled < wanted; --number)
        take(lists.row(number % group * queries + number / group)[0]);
    for (const int32_t id : earlier) take(id);
    for (int64_t id = 0; id < n && filled < wanted; ++id) take(static_cast<int32_t>(id));
    std::fill(entries + filled, entries + num_entries, -1);
}

int64_t build_graphs(const std::vector<HeadInput>& inputs, const BuildOptions& options, ThreadPool& pool) {
    std::vector<HeadBuild> heads;
    for (const HeadInput& input : inputs) heads.emplace_back(input, options);
    const int64_t count = heads.size(), nodes = count ? heads[0].nodes() : 0;
    auto over_heads = [&](auto&& stage) { pool.parallel_for(count, 1, [&](int64_t h) { stage(heads[h]); }); };
    auto over_nodes = [&](auto&& stage) {
        pool.parallel_for(count * nodes, kNodesPerTask, [&](int64_t i) {
            thread_local PruneScratch scratch;
            stage(heads[i / nodes], i % nodes, scratch);
        });
    };
    over_heads([](HeadBuild& head) { head.group(); });
    if (!options.co_occurrence) {
        over_nodes([](HeadBuild& head, int64_t x, PruneScratch& s) { head.link_pivot(x, s); });
        over_heads([](HeadBuild& head) { head.reverse(); });
    }
    over_nodes([](HeadBuild& head, int64_t y, PruneScratch& s) { head.link_all(y, s); });
    return repair_graphs(inputs, options, pool);
}

int64_t repair_graphs(const std::vector<HeadInput>& inputs, const BuildOptions& options, ThreadPool& pool) {
    std::atomic<int64_t> repaired{0};
    pool.parallel_for(inputs.size(), 1, [&](int64_t h) {
        const HeadInput& in = inputs[h];
        choose_entries(in.query_lists, options.queries, in.keys.n, {}, options.num_entries, in.entries);
        repaired += Reachability(in.adjacency, in.keys.n, options.degree).repair(in.entries, options.num_entries);
    });
    return repaired;
}

}  // namespace rag
