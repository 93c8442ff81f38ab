// Python bindings of what searches the keys of many kv heads.
#include <pybind11/stl.h>

#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "graph.h"
#include "retrieve.h"

namespace py = pybind11;

namespace rag {
namespace {

[[noreturn]] void refuse(const char* name, int64_t value, const std::string& allowed) {
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) + ", allowed: " + allowed);
}

// The graphs of all kv heads of sequences that share an index.
struct GraphView {
    std::vector<IndexedRow> rows;

    GraphView(const KeyStore& keys, uintptr_t links, int64_t slots, int64_t segments, uintptr_t entries, int64_t num_entries,
              const KeyStore* exact, int64_t first, uintptr_t assignment, int64_t tokens) {
        if (assignment && tokens < keys.n) refuse("tokens", tokens, std::to_string(keys.n) + " or more, for the keys");
        const Links all{at<const void>(links), slots, segments};
        for (int64_t h = 0; h < keys.heads; ++h)
            rows.push_back({{keys.head(h),
                             {all.row(h * keys.n), slots, segments},
                             at<const int32_t>(entries) + h * num_entries,
                             num_entries,
                             exact ? exact->head(h) : Rows{}},
                            first,
                            assignment ? at<const int32_t>(assignment) + h * tokens : nullptr});
    }
};

void search(const KeyStore& keys, uintptr_t links, int64_t slots, int64_t segments, uintptr_t entries, int64_t num_entries,
            uintptr_t queries, int64_t group, uintptr_t near, int64_t num_near, int64_t k, int64_t ef, int num_threads,
            uintptr_t ids, uintptr_t scores, uintptr_t keys_scored, const KeyStore* exact) {
    py::gil_scoped_release release;
    const GraphView view(keys, links, slots, segments, entries, num_entries, exact, 0, 0, 0);
    std::vector<const IndexedRow*> rows;
    for (const IndexedRow& row : view.rows) rows.push_back(&row);
    retrieve(rows, {at<const float>(queries), group, at<const int32_t>(near), num_near, num_near, k, ef},
             {at<int32_t>(ids), at<float>(scores), at<int64_t>(keys_scored), nullptr, nullptr}, *threads(num_threads));
}

// posted: where a device writes the queries, or null; they are then waited for, and moved to `queries`. foreseen: likewise
// of what they will be about, or null; of it nothing is kept. What was read is absent again afterwards.
std::tuple<int64_t, int64_t, int64_t> retrieve_step(const std::vector<const GraphView*>& views, uintptr_t queries,
                                                    int64_t group, uintptr_t near, int64_t near_stride, int64_t num_near,
                                                    int64_t k, int64_t ef, int num_threads, uintptr_t ids,
                                                    uintptr_t keys_scored, uintptr_t positions, uintptr_t clusters,
                                                    uintptr_t posted, uintptr_t foreseen, int64_t foreseen_ef) {
    py::gil_scoped_release release;
    if (foreseen_ef < 0) refuse("foreseen_ef", foreseen_ef, ">= 0");
    if (num_near < 0 || (num_near && (!near || num_near > near_stride)))
        refuse("num_near", num_near, "0 to " + std::to_string(near ? near_stride : 0) + ", for `near`");
    thread_local std::vector<const IndexedRow*> rows;
    rows.clear();
    for (const GraphView* view : views)
        for (const IndexedRow& row : view->rows) {
            const int64_t width = row.graph.keys.width(), expected = rows.empty() ? width : rows[0]->graph.keys.width();
            if (width != expected) refuse("keys", width, std::to_string(expected) + " wide, as those of the first view");
            if (clusters && !row.assignment) refuse("assignment", 0, "one for every view, for clusters");
            rows.push_back(&row);
        }
    int64_t waited = 0;
    const int64_t found = retrieve(
        rows,
        {at<const float>(posted ? posted : queries), group, at<const int32_t>(near), near ? near_stride : 0, num_near, k, ef,
         posted != 0, at<const float>(foreseen), foreseen_ef},
        {at<int32_t>(ids), nullptr, at<int64_t>(keys_scored), at<int32_t>(positions), at<int32_t>(clusters)},
        *threads(num_threads), &waited);
    if (found == kNotArrived || rows.empty()) return {0, found, waited};
    const int64_t bytes = rows.size() * group * rows[0]->graph.keys.width() * 4;
    if (posted) {
        std::memcpy(at<float>(queries), at<float>(posted), bytes);
        std::memset(at<float>(posted), kAbsent & 0xff, bytes);
        if (foreseen) std::memset(at<float>(foreseen), kAbsent & 0xff, bytes);
    }
    const auto* scored = at<const int64_t>(keys_scored);
    return {std::accumulate(scored, scored + rows.size() * group, int64_t{0}), found, waited};
}

void scan(const KeyStore& keys, uintptr_t queries, int64_t group, int64_t k, int num_threads, uintptr_t ids,
          uintptr_t scores) {
    py::gil_scoped_release release;
    threads(num_threads)->parallel_for(keys.heads * group, 1, [&](int64_t i) {
        const Rows rows = keys.head(i / group);
        extend_lists(rows, at<const float>(queries) + i * rows.width(), &keys.n, 1, 0, k, at<int32_t>(ids) + i * k,
                     at<float>(scores) + i * k);
    });
}

std::vector<int64_t> unite_rows(uintptr_t ids, int64_t rows, int64_t width, int64_t first, uintptr_t positions) {
    py::gil_scoped_release release;
    std::vector<int64_t> counts(rows);
    for (int64_t r = 0; r < rows; ++r)
        counts[r] = unite(at<const int32_t>(ids) + r * width, width, first, at<int32_t>(positions) + r * width);
    return counts;
}

}  // namespace

void bind_search(py::module_& m) {
    py::class_<GraphView>(m, "GraphView", "The graphs of all kv heads of sequences that share an index.")
        .def(py::init<const KeyStore&, uintptr_t, int64_t, int64_t, uintptr_t, int64_t, const KeyStore*, int64_t, uintptr_t,
                      int64_t>(),
             py::arg("keys"), py::arg("links"), py::arg("slots"), py::arg("segments"), py::arg("entries"),
             py::arg("num_entries"), py::arg("exact"), py::arg("first"), py::arg("assignment"), py::arg("tokens"));
    m.def("scan", &scan,
          "Scores every key for one query per (kv head, query head of its group); ids and scores come filled with pads.");
    m.def("search", &search,
          "Searches one query per (kv head, query head of its group); `exact` keys, or None, rank what is found.");
    m.def("retrieve", &retrieve_step,
          "Searches the graphs of all views and unites what each kv head's queries found; returns keys scored, positions, "
          "and nanoseconds waited; -1 positions where posted queries did not come.");
    m.def("unite", &unite_rows,
          "Each id of a row once, plus `first`, in the order met, then -1 pads; returns how many of each row.");
}

}  // namespace rag
