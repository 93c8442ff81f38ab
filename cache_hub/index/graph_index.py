"""Attention-aware graph: RetrievalAttention section 3.2 with RoarGraph's projection, over the keys of a kv head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from config import GraphConfig

from ..pinned import copying, rows_on
from . import _native
from .base import SearchResult, TokenIndex, asked_vectors, check_build, check_insert, check_search, lift, nothing_left
from .key_store import CompactKeys, as_key_store, stored_key_bytes
from .knn import causal_knn, key_knn, listed_queries
from .links import PackedLinks
from .metric import LATE_QUERIES, KeyMetric, query_moment, square_root
from .stage_clock import StageClock
from .tensor_file import check_ids, take

# Of the key links' metric: half of it is the plain one, so that keys which other queries tell apart stay apart.
_RIDGE = 1.0


class AttentionAwareGraphIndex(TokenIndex):
    """One graph per kv head, built from the exact causal neighbour lists of all its query heads.

    A key's links: up to key_degree - key_links made from queries (keys that the same queries want), the rest the
    nearest keys by mean-centred cosine in the metric of attention (metric.py). The graph holds ids; search reads the KV
    store, or one copy where index_dtype differs from the store's dtype. After a walk by an int8 copy the store ranks
    the beam. Options are those of config.GraphConfig.

    After build: links (PackedLinks: 2 bytes for each of key_degree places), entries [R, num_entries] int32 (-1 pads),
    repaired_keys (how many had to be linked to become reachable) and build_seconds by stage.
    """

    strategy = "attention_aware_graph"
    lists_queries = True
    # Those of the build that no longer matter once the links are there, and those of the cache, are among them.
    search_options = frozenset(
        {
            "ef_search",
            "top_k",
            "warm_start",
            "resume_ef",
            "graph_build_batch",
            "knn_backend",
            "estimation",
            "estimation_budget",
            "insert_batch",
        }
    )

    def __init__(self, num_threads: int | None = None, **options: Any) -> None:
        self.options = GraphConfig(**options)
        self.num_threads = num_threads or torch.get_num_threads()
        self.build_seconds = {}

    def build(
        self, keys: Tensor, queries: Tensor, positions: Tensor | None = None, extra: Tensor | None = None
    ) -> None:
        """See TokenIndex.build. keys in CPU memory; queries on any device, which also computes the neighbour lists."""
        self.start(keys, queries, positions, extra)()

    def start(
        self,
        keys: Tensor,
        queries: Tensor,
        positions: Tensor | None = None,
        extra: Tensor | None = None,
        keys_there: Tensor | None = None,
    ) -> Callable[[], None]:
        """See TokenIndex.start; after a GPU's lists and links the rest is entries, repair, copies of the keys."""
        check_build(keys, queries, positions, extra)
        o = self.options
        clock = StageClock(self.build_seconds, queries.device)
        how = (o.graph_build_batch, o.knn_backend, self.num_threads)
        if keys_there is None:
            keys_there = rows_on(keys, queries.device)
        by_query = causal_knn(keys_there, queries, positions, o.q_knn, *how, extra=extra, stride=o.query_stride)
        clock.stage("query_key_knn")
        wanted = o.key_degree if o.key_links else 0
        root = self._root(queries, extra is not None)
        by_key = key_knn(keys_there, wanted, *how, extra=extra, root=root)
        self._metric = KeyMetric.of(keys_there, extra, root) if o.key_links else None
        clock.stage("key_key_knn")

        degree = PackedLinks.capacity(keys.shape[1], o.key_degree)
        if not queries.is_cuda:
            self._hold(keys, extra)
            self._pack(self._build_on_cpu(keys, by_query, by_key, degree))
            clock.stage("projection")
            return nothing_left
        wide = keys_there if extra is None or self._by_co_occurrence else lift(keys_there, extra)
        links, pivots = self._project(wide, by_query, by_key, degree), by_query[..., 0].contiguous()
        clock.stage("projection")
        with copying(queries.device, links, pivots) as copied:
            links, pivots = (_pinned_copy(states) for states in (links, pivots))
        return partial(self._finish, keys, extra, links, pivots, copied)

    def _finish(
        self, keys: Tensor, extra: Tensor | None, links: Tensor, pivots: Tensor, copied: torch.cuda.Event
    ) -> None:
        """The CPU's part, behind `copied`: links [R, N, degree], and the first ids [R, g, M'] of the queries' lists."""
        clock = StageClock(self.build_seconds, keys.device)
        copied.synchronize()
        clock.stage("links_copy")
        self._hold(keys, extra)
        clock.stage("keys_copy")
        self.repaired_keys = _native.repair(
            pivots.data_ptr(),
            len(pivots),
            pivots.shape[1],
            pivots.shape[2],
            links.shape[1],
            links.shape[2],
            self.options.num_entries,
            self.num_threads,
            links.data_ptr(),
            self.entries.data_ptr(),
        )
        clock.stage("repair")
        self._pack(links)
        clock.stage("pack")

    def _hold(self, keys: Tensor, extra: Tensor | None) -> None:
        """All but links and entries, for which there is room then."""
        o, rows = self.options, len(keys)
        self._walk_by(keys, keys.to(self._index_dtype(keys)), extra)
        self._compact = CompactKeys.of(keys) if o.index_dtype == "int8" else None
        self._reciprocals = torch.empty(rows, 0)  # of all keys from the first insertion on, which read them once
        self.entries = torch.empty(rows, o.num_entries, dtype=torch.int32)

    def _pack(self, links: Tensor) -> None:
        self.links = PackedLinks.pack(links, self.options.key_degree, self.num_threads)

    def _index_dtype(self, keys: Tensor) -> torch.dtype:
        """Of the keys that the walk, or what ranks the beam after it, reads."""
        named = self.options.index_dtype
        return keys.dtype if named in ("auto", "int8") else getattr(torch, named)

    def _walk_by(self, built_for: Tensor, keys: Tensor, extra: Tensor | None) -> None:
        self._built_for, self.keys, self.extra = built_for, keys, extra
        self._copied = keys is not built_for
        self._store = as_key_store(keys, extra)

    def state(self) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """See TokenIndex.state."""
        tensors = {"entries": self.entries, "links": self.links.data}
        tensors["repaired_keys"] = torch.tensor(self.repaired_keys)
        if self._copied:
            tensors["keys"] = self.keys
        if self._compact:
            tensors |= vars(self._compact)
        if self._metric is not None:
            tensors |= {name: tensor for name, tensor in vars(self._metric).items() if tensor is not None}
        return tensors, self._built_for, self.extra

    def restore(self, tensors: dict[str, Tensor], keys: Tensor, extra: Tensor | None) -> None:
        """See TokenIndex.restore; links, entries and the compact copy stay where the tensors are."""
        (rows, n, _), o, dtype = keys.shape, self.options, self._index_dtype(keys)
        self.entries = take(tensors, "entries", (rows, o.num_entries), torch.int32)
        check_ids(self.entries, "entries", n)
        check_ids(self.entries[:, 0], "first entries", n, start=0)
        links = tensors.pop("links", torch.empty(0, 0, 0))
        if links.shape[:2] != (rows, n):
            raise ValueError(f"links: got {list(links.shape)}, allowed: [{rows}, {n}, places], for the keys")
        self.links = PackedLinks.checked(links, o.key_degree)
        self.repaired_keys = int(take(tensors, "repaired_keys", (), torch.int64))
        self._walk_by(keys, keys if dtype == keys.dtype else take(tensors, "keys", keys.shape, dtype), extra)
        self._metric, self._reciprocals = None, torch.empty(rows, 0)
        if o.key_links:
            self._metric = KeyMetric.taken(tensors, rows, keys.shape[2] + (extra is not None))
        self._compact = None
        if o.index_dtype == "int8":
            codes = take(tensors, "codes", keys.shape, torch.int8)
            scales = take(tensors, "scales", (rows, n), torch.float32)
            self._compact = CompactKeys(codes, scales, take(tensors, "means", (rows, keys.shape[2]), torch.float32))

    def _build_on_cpu(self, keys: Tensor, by_query: Tensor, by_key: Tensor, degree: int) -> Tensor:
        o = self.options
        rows, n, _ = keys.shape
        group, m = by_query.shape[1:3]
        links = torch.empty(rows, n, degree, dtype=torch.int32)
        self.repaired_keys = _native.build(
            as_key_store(keys, self.extra),
            by_query.data_ptr(),
            group,
            m,
            o.q_knn,
            by_key.data_ptr(),
            by_key.shape[2],
            degree,
            min(o.key_degree - o.key_links, degree),
            self._by_co_occurrence,
            o.num_entries,
            self.num_threads,
            links.data_ptr(),
            self.entries.data_ptr(),
        )
        return links

    @property
    def _by_co_occurrence(self) -> bool:
        """Whether that is how query lists make links; "auto" is RoarGraph's projection for the paper's recipe alone."""
        o = self.options
        return o.projection == "co_occurrence" or (o.projection == "auto" and o.key_links > 0)

    def _root(self, queries: Tensor, lifted: bool) -> Tensor | None:
        """Of key_knn for queries [R, g, M, D]; None for the plain cosine, and without queries."""
        if self.options.key_metric == "cosine" or not self.options.key_links or queries.shape[2] == 0:
            return None
        late = queries[:, :, -LATE_QUERIES:]
        return square_root(query_moment(lift(late, 1.0) if lifted else late).cpu(), _RIDGE)

    def _project(self, keys: Tensor, by_query: Tensor, by_key: Tensor, degree: int) -> Tensor:
        """Links [R, N, degree] on the GPU of the lists."""
        from .projection import project  # Triton only where it is used

        query_links = min(self.options.key_degree - self.options.key_links, degree)
        return project(keys, by_query, by_key, degree, query_links, self._by_co_occurrence)

    def insert(
        self,
        keys: Tensor,
        queries: Tensor | None = None,
        positions: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> None:
        """See TokenIndex.insert. The queries' lists are found by search among the old keys, exactly among the new ones,
        and become links as in `build`; nearest keys are found likewise. repaired_keys as after `build`."""
        check_insert(keys, self.keys.shape, self.extra is not None, queries, positions, extra)
        store = as_key_store(keys, extra)
        o = self.options
        rows, before, _ = self.keys.shape
        n = keys.shape[1]
        asked, lists = torch.empty(0), torch.empty(rows, 0, 0, o.q_knn, dtype=torch.int32)
        scores = torch.empty(0)
        if queries is not None:
            group, m = queries.shape[1:3]
            asked = asked_vectors(queries.flatten(1, 2), extra is not None)
            found = self._search(asked, o.q_knn)
            lists, scores = found.ids.view(rows, group, m, o.q_knn), found.scores
        visible = torch.full(lists.shape[2:3], n) if positions is None else (positions.cpu() + 1).clamp(max=n)
        near, metric = torch.empty(rows, n - before, 0, dtype=torch.int32), self._metric
        reciprocals = torch.empty(0)
        if metric is not None:
            fresh = metric.reciprocals(keys, extra, self._reciprocals.shape[1])
            reciprocals = torch.cat((self._reciprocals, fresh), 1)
            towards = metric.towards(keys[:, before:] if extra is None else lift(keys[:, before:], extra[:, before:]))
            near = self._search(towards, max(o.ef_search, o.key_degree)).ids
        links = self.links.grown(n)
        degree = PackedLinks.capacity(n, links.slots)
        entries = self.entries.clone()
        form = None if metric is None else metric.form
        self.repaired_keys = _native.insert(
            store,
            before,
            asked.data_ptr(),
            visible.data_ptr(),
            lists.shape[1],
            lists.shape[2],
            lists.data_ptr(),
            scores.data_ptr(),
            o.q_knn,
            near.data_ptr(),
            near.shape[2],
            0 if metric is None else metric.mean.data_ptr(),
            0 if form is None else form.data_ptr(),
            reciprocals.data_ptr(),
            degree,
            min(o.key_degree - o.key_links, degree),
            self._by_co_occurrence,
            o.num_entries,
            self.num_threads,
            links.data.data_ptr(),
            links.slots,
            links.segments,
            entries.data_ptr(),
        )
        grown = torch.cat((self.keys, keys[:, before:].to(self.keys.dtype)), 1) if self._copied else keys
        self._walk_by(keys, grown, extra)
        self._compact = None if self._compact is None else self._compact.grown(keys)
        self.entries, self.links, self._reciprocals = entries, links, reciprocals

    def search(self, queries: Tensor, k: int, near: Tensor | None = None) -> SearchResult:
        """Best-first search from `near` and the entries with a beam of max(ef_search, k); see TokenIndex.search."""
        rows, n, dim = self.keys.shape
        check_search(queries, k, rows, dim, near, n)
        return self._search(asked_vectors(queries, self.extra is not None), k, near)

    def _search(self, asked: Tensor, k: int, near: Tensor | None = None) -> SearchResult:
        """For asked [R, g, D] float32, or [R, g, D + 1], contiguous."""
        rows, group, _ = asked.shape
        starts = torch.empty(rows, group, 0, dtype=torch.int32) if near is None else near.contiguous()
        ids = torch.empty(rows, group, k, dtype=torch.int32)
        scores = torch.empty(rows, group, k)
        keys_scored = torch.zeros(rows, group, dtype=torch.int64)
        walked, exact = (self._store, None) if self._compact is None else (self._compact.view(self.extra), self._store)
        _native.search(
            walked,
            self.links.data.data_ptr(),
            self.links.slots,
            self.links.segments,
            self.entries.data_ptr(),
            self.options.num_entries,
            asked.data_ptr(),
            group,
            starts.data_ptr(),
            starts.shape[2],
            k,
            self.options.ef_search,
            self.num_threads,
            ids.data_ptr(),
            scores.data_ptr(),
            keys_scored.data_ptr(),
            exact,
        )
        return SearchResult(ids, scores, keys_scored)

    def view(self, first: int, assignment: Tensor | None = None) -> _native.GraphView:
        """What _native.Retrieving searches, made anew after `insert`: ids come as positions from `first` on, beside
        them, where an assignment [R, >= N] int32 is given, what it says of them; it must be on the CPU, contiguous."""
        walked, exact = (self._store, None) if self._compact is None else (self._compact.view(self.extra), self._store)
        return _native.GraphView(
            walked,
            self.links.data.data_ptr(),
            self.links.slots,
            self.links.segments,
            self.entries.data_ptr(),
            self.options.num_entries,
            exact,
            first,
            0 if assignment is None else assignment.data_ptr(),
            0 if assignment is None else assignment.shape[1],
        )

    @property
    def key_bytes(self) -> int:
        """See TokenIndex.key_bytes; as the walk reads it."""
        compact = self._compact
        if compact is None:
            return stored_key_bytes(self.keys, self.extra)
        return stored_key_bytes(compact.codes, self.extra) + compact.scales.element_size()

    def scored_bytes(self, scored: int, queries: int, k: int) -> int:
        """See TokenIndex.scored_bytes; the beam behind a walk by an int8 copy is read from the store."""
        walked = super().scored_bytes(scored, queries, k)
        if self._compact is None:
            return walked
        beam = min(max(self.options.ef_search, k), self.keys.shape[1])
        more = stored_key_bytes(self.keys, self.extra) - self.key_bytes
        return walked + queries * beam * more

    @property
    def adjacency(self) -> Tensor:
        """The links as int32 with -1 pads at the end, [R, N, key_degree]; a copy."""
        return self.links.unpack()

    def all_options(self) -> dict[str, Any]:
        return self.options.model_dump()

    def expected_bytes(self, rows: int, keys: int, dim: int, dtype: torch.dtype, lifted: bool = False) -> int:
        """See TokenIndex.expected_bytes; links, entries, the copy that search reads, the key links' metric."""
        o, wide = self.options, dim + lifted
        row = PackedLinks.expected_bytes(keys, o.key_degree) + 4 * o.num_entries
        if o.index_dtype == "int8":
            row += keys * (dim + 4) + 4 * dim
        elif o.index_dtype != "auto" and getattr(torch, o.index_dtype) != dtype:
            row += keys * dim * getattr(torch, o.index_dtype).itemsize
        if o.key_links:
            row += 4 * wide * (1 if o.key_metric == "cosine" else 1 + wide)
        return rows * row

    def build_bytes(self, rows: int, group: int, queries: int, keys: int, dim: int) -> int:
        """See TokenIndex.build_bytes; the neighbour lists of queries and keys, and the links before they are packed."""
        o = self.options
        listed = len(listed_queries(queries, o.query_stride))
        places = min(o.key_degree, keys - 1) if o.key_links else 0
        places += PackedLinks.capacity(keys, o.key_degree)
        return 4 * rows * (group * listed * o.q_knn + keys * places)

    @property
    def nbytes(self) -> int:
        held = [self.links.data, self.entries, self._reciprocals] + ([self.keys] if self._copied else [])
        made = [part.nbytes for part in (self._compact, self._metric) if part is not None]
        return sum(t.nbytes for t in held) + sum(made)


def _pinned_copy(states: Tensor) -> Tensor:
    """On its way by the current stream. torch keeps the memory for the next layer's, and knows when it may be used."""
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states, non_blocking=True)
