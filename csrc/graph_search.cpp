#include <algorithm>
#include <limits>

#include "graph.h"

namespace rag {

int64_t search_graph(const Graph& graph, const float* query, int64_t k, int64_t ef, SearchScratch& s, int32_t* ids,
                     float* scores) {
    const int64_t n = graph.keys.n;
    const int64_t width = std::min(std::max(ef, k), n);
    const int64_t batch = std::max(graph.degree, graph.num_entries);
    if (static_cast<int64_t>(s.seen.size()) < n) s.seen.assign(n, 0), s.epoch = 0;
    if (++s.epoch == 0) std::fill(s.seen.begin(), s.seen.end(), 0), s.epoch = 1;
    if (static_cast<int64_t>(s.beam.size()) < width + 1) s.beam.resize(width + 1), s.expanded.resize(width + 1);
    if (static_cast<int64_t>(s.fresh.size()) < batch) s.fresh.resize(batch), s.scores.resize(batch);

    int64_t filled = 0, next = 0, scored = 0;
    auto visit = [&](const int32_t* links, int64_t count) {
        int64_t fresh = 0;
        for (int64_t i = 0; i < count && links[i] >= 0; ++i) {
            if (s.seen[links[i]] == s.epoch) continue;
            s.seen[links[i]] = s.epoch;
            s.fresh[fresh++] = links[i];
        }
        graph.keys.score(query, s.fresh.data(), fresh, s.scores.data());
        scored += fresh;
        for (int64_t i = 0; i < fresh; ++i) {
            const Neighbour candidate{s.scores[i], s.fresh[i]};
            if (filled == width && !nearer(candidate, s.beam[filled - 1])) continue;
            const auto begin = s.beam.begin();
            const int64_t at = std::upper_bound(begin, begin + filled, candidate, nearer) - begin;
            const int64_t last = std::min(filled, width - 1);
            std::copy_backward(begin + at, begin + last, begin + last + 1);
            std::copy_backward(s.expanded.begin() + at, s.expanded.begin() + last, s.expanded.begin() + last + 1);
            s.beam[at] = candidate;
            s.expanded[at] = 0;
            filled = last + 1;
            next = std::min(next, at);
        }
    };
    visit(graph.entries, graph.num_entries);
    while (true) {
        while (next < filled && s.expanded[next]) ++next;
        if (next == filled) break;
        s.expanded[next] = 1;
        visit(graph.adjacency + s.beam[next].id * graph.degree, graph.degree);
    }
    for (int64_t i = 0; i < k; ++i) {
        ids[i] = i < filled ? s.beam[i].id : -1;
        scores[i] = i < filled ? s.beam[i].score : -std::numeric_limits<float>::infinity();
    }
    return scored;
}

}  // namespace rag
