// Python bindings of what searches the keys of many kv heads.
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
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

// A step's retrieval, on its way from the start. posted: where a device writes the queries, or null; they are then waited
// for, and moved to `queries`. foreseen: likewise of what they will be about, or null; of it nothing is kept. What was read
// is absent again afterwards.
class Retrieving {
   public:
    Retrieving(const std::vector<const GraphView*>& views, uintptr_t queries, int64_t group, uintptr_t near,
               int64_t near_stride, int64_t num_near, int64_t k, int64_t ef, int num_threads, uintptr_t ids,
               uintptr_t keys_scored, uintptr_t positions, uintptr_t clusters, uintptr_t posted, uintptr_t foreseen,
               int64_t foreseen_ef)
        : pool_(threads(num_threads)), queries_(queries), posted_(posted), foreseen_(foreseen), scored_(keys_scored) {
        if (foreseen_ef < 0) refuse("foreseen_ef", foreseen_ef, ">= 0");
        if (num_near < 0 || (num_near && (!near || num_near > near_stride)))
            refuse("num_near", num_near, "0 to " + std::to_string(near ? near_stride : 0) + ", for `near`");
        std::vector<const IndexedRow*> rows;
        for (const GraphView* view : views)
            for (const IndexedRow& row : view->rows) {
                const int64_t width = row.graph.keys.width(), expected = rows.empty() ? width : rows[0]->graph.keys.width();
                if (width != expected) refuse("keys", width, std::to_string(expected) + " wide, as those of the first view");
                if (clusters && !row.assignment) refuse("assignment", 0, "one for every view, for clusters");
                rows.push_back(&row);
            }
        searches_ = rows.size() * group;
        bytes_ = rows.empty() ? 0 : searches_ * rows[0]->graph.keys.width() * 4;
        const Asked asked{at<const float>(posted ? posted : queries), group, at<const int32_t>(near), near ? near_stride : 0,
                          num_near, k, ef, posted != 0, at<const float>(foreseen), foreseen_ef};
        const Retrieved out{at<int32_t>(ids), nullptr, at<int64_t>(keys_scored), at<int32_t>(positions), at<int32_t>(clusters)};
        retrieval_.emplace(std::move(rows), asked, out, pool_->size());
        job_ = pool_->start(std::min<int64_t>(pool_->size(), retrieval_->tasks()), work_);
    }
    ~Retrieving() {
        if (job_) pool_->finish(job_);
    }
    Retrieving(const Retrieving&) = delete;
    Retrieving& operator=(const Retrieving&) = delete;

    std::tuple<int64_t, int64_t, int64_t> finish() {
        pool_->finish(job_);
        const int64_t found = retrieval_->found();
        if (found == kNotArrived) return {0, found, retrieval_->waited()};
        if (posted_) {
            std::memcpy(at<float>(queries_), at<float>(posted_), bytes_);
            std::memset(at<float>(posted_), kAbsent & 0xff, bytes_);
            if (foreseen_) std::memset(at<float>(foreseen_), kAbsent & 0xff, bytes_);
        }
        const auto* scored = at<const int64_t>(scored_);
        return {std::accumulate(scored, scored + searches_, int64_t{0}), found, retrieval_->waited()};
    }

   private:
    struct Work {
        std::optional<Retrieval>& retrieval;
        void operator()(int64_t) const { retrieval->work(); }
    };

    std::shared_ptr<ThreadPool> pool_;
    uintptr_t queries_, posted_, foreseen_, scored_;
    int64_t searches_ = 0, bytes_ = 0;
    std::optional<Retrieval> retrieval_;
    const Work work_{retrieval_};
    uint64_t job_ = 0;
};

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
    py::class_<Retrieving>(m, "Retrieving",
                           "Searches the graphs of all views and unites what each kv head's queries found, from now on.")
        .def(py::init<const std::vector<const GraphView*>&, uintptr_t, int64_t, uintptr_t, int64_t, int64_t, int64_t, int64_t,
                      int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t>(),
             py::arg("views"), py::arg("queries"), py::arg("group"), py::arg("near"), py::arg("near_stride"),
             py::arg("num_near"), py::arg("k"), py::arg("ef"), py::arg("num_threads"), py::arg("ids"), py::arg("keys_scored"),
             py::arg("positions"), py::arg("clusters"), py::arg("posted"), py::arg("foreseen"), py::arg("foreseen_ef"),
             py::keep_alive<1, 2>(), py::call_guard<py::gil_scoped_release>())
        .def("finish", &Retrieving::finish, py::call_guard<py::gil_scoped_release>(),
             "Joins in and waits; keys scored, positions, nanoseconds waited; -1 positions where queries did not come.");
    m.def("unite", &unite_rows,
          "Each id of a row once, plus `first`, in the order met, then -1 pads; returns how many of each row.");
}

}  // namespace rag
