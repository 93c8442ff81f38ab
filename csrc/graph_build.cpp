#include <algorithm>
#include <memory>
#include <numeric>

#include "co_occurrence.h"
#include "graph.h"

namespace rag {
namespace {

constexpr int64_t kNodesPerTask = 64;
constexpr int64_t kLateQueries = 32;

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

// Candidates of one key without repetition, and the buffers to prune them: nothing is allocated or cleared per key.
class PruneScratch {
   public:
    std::vector<Neighbour> sorted;
    std::vector<int32_t> candidates, rejected;
    std::vector<float> pivot, kept_rows, scores;
    std::vector<uint32_t> weights;

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
void prune_fill(const Rows& keys, int32_t x, int64_t width, PruneScratch& s, int32_t* out) {
    const auto& c = s.candidates;
    s.pivot.resize(keys.width());
    s.kept_rows.resize((width + 1) * keys.width());
    s.scores.resize(c.size());
    keys.load(x, s.pivot.data());
    keys.score(s.pivot.data(), c.data(), c.size(), s.scores.data());
    s.sorted.resize(c.size());
    for (size_t i = 0; i < c.size(); ++i) s.sorted[i] = {s.scores[i], c[i]};
    std::sort(s.sorted.begin(), s.sorted.end(), [](const Neighbour& a, const Neighbour& b) { return nearer(a, b); });

    int64_t kept = 0;
    s.rejected.clear();
    for (const Neighbour& p : s.sorted) {
        if (kept == width) break;
        float* row = s.kept_rows.data() + kept * keys.width();
        keys.load(p.id, row);
        if (any_above(row, s.kept_rows.data(), kept, keys.width(), p.score))
            s.rejected.push_back(p.id);
        else
            out[kept++] = p.id;
    }
    for (size_t i = 0; kept < width && i < s.rejected.size(); ++i) out[kept++] = s.rejected[i];
    std::fill(out + kept, out + width, -1);
}

// [num_entries], -1 pads: first the keys most often ranked first by any query, then those by the last queries.
void choose_entries(const Lists& lists, int64_t n, const BuildOptions& options, int32_t* entries) {
    std::vector<int64_t> votes(n, 0), late_votes(n, 0);
    for (int64_t i = 0; i < lists.count; ++i) {
        const int32_t pivot = lists.row(i)[0];
        if (pivot < 0) continue;
        ++votes[pivot];
        if (i % options.queries >= options.queries - kLateQueries) ++late_votes[pivot];
    }
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::vector<uint8_t> chosen(n, 0);
    int64_t filled = 0;
    auto take_until = [&](int64_t count, auto&& before) {
        const int64_t candidates = std::min(options.num_entries, n);
        std::partial_sort(order.begin(), order.begin() + candidates, order.end(), before);
        for (int64_t i = 0; i < candidates && filled < count; ++i)
            if (!chosen[order[i]]) chosen[entries[filled++] = order[i]] = 1;
    };
    take_until((std::min(options.num_entries, n) + 1) / 2, [&](int32_t a, int32_t b) {
        return votes[a] != votes[b] ? votes[a] > votes[b] : a < b;
    });
    take_until(std::min(options.num_entries, n), [&](int32_t a, int32_t b) {
        if (late_votes[a] != late_votes[b]) return late_votes[a] > late_votes[b];
        return votes[a] != votes[b] ? votes[a] > votes[b] : a < b;
    });
    std::fill(entries + filled, entries + options.num_entries, -1);
}

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

// The stages of one kv head's build. Each reads only what the stage before has finished: the graph is the same for any
// number of threads. Stages over nodes write only what belongs to their node.
class HeadBuild {
   public:
    HeadBuild(const HeadInput& input, const BuildOptions& options)
        : in_(input), options_(options), n_(input.keys.n), width_(options.query_links) {}

    void group() {
        if (options_.co_occurrence) {
            occurrences_ = std::make_unique<Occurrences>(in_.query_lists, options_.queries, n_);
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
        prune_fill(in_.keys, static_cast<int32_t>(x), width_, s, &forward_[x * width_]);
    }
    void reverse() { reverse_ = reverse_links(forward_, n_, width_); }
    // Query links of a key, then the nearest keys up to the degree.
    void link_all(int64_t y, PruneScratch& s) {
        int32_t* out = in_.adjacency + y * options_.degree;
        if (options_.co_occurrence) {
            if (static_cast<int64_t>(s.weights.size()) < n_) s.weights.resize(n_, 0);
            co_occurring(in_.query_lists, *occurrences_, y, width_, s.weights, s.candidates, out);
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
        choose_entries(in.query_lists, in.keys.n, options, in.entries);
        repaired += Reachability(in.adjacency, in.keys.n, options.degree).repair(in.entries, options.num_entries);
    });
    return repaired;
}

}  // namespace rag
