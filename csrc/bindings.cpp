// Python bindings of all but search.
#include <pybind11/stl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "bindings.h"
#include "graph.h"
#include "graph_insert.h"
#include "nearest.h"
#include "row_kernels.h"
#include "tile_kernels.h"

namespace py = pybind11;
using namespace rag;

namespace {

std::atomic<bool> forked{false};  // from a process that may have had threads

}  // namespace

std::shared_ptr<ThreadPool> rag::threads(int count) {
    if (count < 1) throw std::invalid_argument("num_threads: got " + std::to_string(count) + ", allowed: 1 or more");
    static std::mutex mutex;
    static auto* pool = new std::shared_ptr<ThreadPool>;
    static pid_t owner = getpid();
    std::lock_guard<std::mutex> lock(mutex);
    if (owner != getpid()) {
        pool = new std::shared_ptr<ThreadPool>;
        owner = getpid();
    }
    if (!*pool || (*pool)->size() != count) *pool = std::make_shared<ThreadPool>(count, !forked);
    return *pool;
}

PYBIND11_MODULE(_native, m) {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    m.doc() = "Construction of and search in attention-aware graphs (C++).";

    py::class_<KeyStore>(m, "KeyStore")
        .def(py::init<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t,
                      uintptr_t>(),
             py::arg("address"), py::arg("dtype"), py::arg("heads"), py::arg("n"), py::arg("dim"), py::arg("head_stride"),
             py::arg("row_stride"), py::arg("extra") = 0, py::arg("scales") = 0);
    bind_search(m);

    m.def(
        "build",
        [](const KeyStore& keys, uintptr_t query_lists, int64_t group, int64_t queries, int64_t list_width,
           uintptr_t key_lists, int64_t key_list_width, int64_t degree, int64_t query_links, bool co_occurrence,
           int64_t num_entries, int num_threads, uintptr_t adjacency, uintptr_t entries) {
            py::gil_scoped_release release;
            const int64_t lists_per_head = group * queries;
            std::vector<HeadInput> heads;
            for (int64_t h = 0; h < keys.heads; ++h)
                heads.push_back({keys.head(h),
                                 {at<const int32_t>(query_lists) + h * lists_per_head * list_width, lists_per_head, list_width},
                                 {at<const int32_t>(key_lists) + h * keys.n * key_list_width, keys.n, key_list_width},
                                 at<int32_t>(adjacency) + h * keys.n * degree,
                                 at<int32_t>(entries) + h * num_entries});
            return build_graphs(heads, {degree, query_links, num_entries, queries, co_occurrence}, *threads(num_threads));
        },
        "Builds the graph of every kv head; returns how many keys had to be linked to become reachable.");

    m.def(
        "repair",
        [](uintptr_t pivots, int64_t heads, int64_t group, int64_t queries, int64_t n, int64_t degree, int64_t num_entries,
           int num_threads, uintptr_t adjacency, uintptr_t entries) {
            py::gil_scoped_release release;
            std::vector<HeadInput> inputs;
            for (int64_t h = 0; h < heads; ++h)
                inputs.push_back({{nullptr, Dtype::float32, n, 0, 0, nullptr},
                                  {at<const int32_t>(pivots) + h * group * queries, group * queries, 1},
                                  {},
                                  at<int32_t>(adjacency) + h * n * degree,
                                  at<int32_t>(entries) + h * num_entries});
            return repair_graphs(inputs, {degree, 0, num_entries, queries, false}, *threads(num_threads));
        },
        "Entries and reachability of graphs whose links are there already; returns as build does.");

    m.def(
        "insert",
        [](const KeyStore& keys, int64_t before, uintptr_t queries, uintptr_t visible, int64_t group, int64_t count,
           uintptr_t lists, uintptr_t list_scores, int64_t list_width, uintptr_t near, int64_t near_width, uintptr_t mean,
           uintptr_t form, uintptr_t reciprocals, int64_t degree, int64_t query_links, bool co_occurrence,
           int64_t num_entries, int num_threads, uintptr_t links, int64_t slots, int64_t segments, uintptr_t entries) {
            py::gil_scoped_release release;
            const int64_t lists_per_head = group * count;
            const Links all{at<const void>(links), slots, segments};
            std::vector<HeadGrowth> heads;
            for (int64_t h = 0; h < keys.heads; ++h) {
                const Rows rows = keys.head(h);
                const int64_t first = h * lists_per_head, width = rows.width();
                heads.push_back({rows, before,
                                 at<const float>(queries) + first * width,
                                 at<int32_t>(lists) + first * list_width, at<float>(list_scores) + first * list_width,
                                 {at<const int32_t>(near) + h * (keys.n - before) * near_width, keys.n - before, near_width},
                                 at<const float>(mean) + (mean ? h * width : 0),
                                 at<const float>(form) + (form ? h * width * width : 0),
                                 at<const float>(reciprocals) + (mean ? h * keys.n : 0),
                                 {all.row(h * keys.n), slots, segments},
                                 at<int32_t>(entries) + h * num_entries});
            }
            return insert_keys(heads, {degree, query_links, num_entries, count, co_occurrence}, group, list_width,
                               at<const int64_t>(visible), *threads(num_threads));
        },
        "Links the keys from `before` on into graphs of those before; returns as build does.");

    m.def(
        "extend",
        [](const KeyStore& keys, uintptr_t queries, uintptr_t visible, int64_t count, int64_t begin, int64_t k,
           uintptr_t ids, uintptr_t scores) {
            py::gil_scoped_release release;
            extend_lists(keys.head(0), at<const float>(queries), at<const int64_t>(visible), count, begin, k,
                         at<int32_t>(ids), at<float>(scores));
        },
        "Adds the keys begin..visible[i] - 1 to the best-first list of every query i.");

    m.def(
        "nearest",
        [](const KeyStore& keys, uintptr_t queries, uintptr_t visible, int64_t count, int64_t k, size_t kernel,
           uintptr_t ids) {
            py::gil_scoped_release release;
            return nearest_keys(keys.head(0), at<const float>(queries), at<const int64_t>(visible), count, k,
                                tile_kernels().at(kernel), at<int32_t>(ids));
        },
        "Exact lists of the keys nearest to every query, by one of tile_kernels; returns how many candidates it scored.");

    m.def(
        "tile_kernels",
        [] {
            std::vector<std::string> names;
            for (const TileKernel& kernel : tile_kernels()) names.push_back(kernel.name);
            return names;
        },
        "Names of the products that `nearest` can find candidates by on this CPU, the fastest first, the plain one last.");

    m.def(
        "trim_memory",
        [] {
#ifdef __GLIBC__
            malloc_trim(0);
#endif
        },
        "Gives free memory back to the system, of which the C library keeps what large temporaries took.");

    m.def(
        "row_kernels",
        [] {
            std::vector<std::string> names;
            for (const RowKernel& kernel : row_kernels()) names.push_back(kernel.name);
            return names;
        },
        "Names of the inner loops that this CPU runs, the one in use first, the plain one last.");

    m.def(
        "score",
        [](const KeyStore& keys, size_t kernel, uintptr_t query, uintptr_t ids, int64_t count, uintptr_t scores) {
            const Rows rows = keys.head(0);
            row_kernels().at(kernel).score[keys.dtype](rows, at<const float>(query), at<const int32_t>(ids), count,
                                                       at<float>(scores));
        },
        "Scores keys of the first kv head, without `extra`, by one of row_kernels.");

    m.def(
        "pack_links",
        [](uintptr_t ids, int64_t rows, int64_t width, int64_t segments, int64_t slots, int num_threads, uintptr_t out) {
            py::gil_scoped_release release;
            constexpr int64_t kRows = 4096;
            threads(num_threads)->parallel_for((rows + kRows - 1) / kRows, 1, [&](int64_t part) {
                const int64_t first = part * kRows;
                pack_links(at<const int32_t>(ids) + first * width, std::min(kRows, rows - first), width, segments, slots,
                           at<uint16_t>(out) + first * slots);
            });
        },
        "Links in 16 bits each; see links.h.");

    m.def(
        "unpack_links",
        [](uintptr_t links, int64_t rows, int64_t slots, int64_t segments, uintptr_t out) {
            py::gil_scoped_release release;
            unpack_links({at<const void>(links), slots, segments}, rows, at<int32_t>(out));
        },
        "Links of any layout as int32 [rows, slots] with -1 pads.");
}
