#include "prune.h"

namespace rag {

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

}  // namespace rag
