"""Attention-aware graph: RetrievalAttention section 3.2 with RoarGraph's projection, over the keys of a kv head."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from config import GraphConfig

from . import _native
from .base import SearchResult, TokenIndex, asked_vectors, check_build, check_search, lift
from .key_store import CompactKeys, as_key_store
from .knn import causal_knn, key_knn
from .links import PackedLinks


class AttentionAwareGraphIndex(TokenIndex):
    """One graph per kv head, built from the exact causal neighbour lists of all its query heads.

    A key's links: up to key_degree - key_links projected from queries (keys that the same queries want), the rest the
    nearest keys by mean-centred cosine. The graph holds ids; search reads the KV store, or one copy where index_dtype
    differs from the store's dtype. After a walk by an int8 copy the store ranks the beam. Options are those of
    config.GraphConfig.

    After build: links (PackedLinks: 2 bytes for each of key_degree places), entries [R, num_entries] int32 (-1 pads),
    repaired_keys (how many had to be linked to become reachable) and build_seconds by stage.
    """

    def __init__(self, num_threads: int | None = None, **options: Any) -> None:
        self.options = GraphConfig(**options)
        self.num_threads = num_threads or torch.get_num_threads()
        self.build_seconds = {}

    def build(
        self, keys: Tensor, queries: Tensor, positions: Tensor | None = None, extra: Tensor | None = None
    ) -> None:
        """See TokenIndex.build. keys in CPU memory; queries on any device, which also computes the neighbour lists."""
        check_build(keys, queries, positions, extra)
        o = self.options
        rows = len(keys)
        clock = _StageClock(self.build_seconds, queries.device)
        how = (o.graph_build_batch, o.knn_backend, self.num_threads)
        keys_there = keys.to(queries.device)
        by_query = causal_knn(keys_there, queries, positions, o.q_knn, *how, extra=extra)
        clock.stage("query_key_knn")
        wanted = o.key_degree if o.key_links else 0
        by_key = key_knn(keys_there, wanted, *how, extra=extra)
        clock.stage("key_key_knn")

        self.extra = extra
        self._compact = CompactKeys.of(keys) if o.index_dtype == "int8" else None
        own = o.index_dtype in ("auto", "int8")
        self.keys = keys if own else keys.to(getattr(torch, o.index_dtype))
        self._copied = self.keys is not keys
        self._store = as_key_store(self.keys, extra)
        self.entries = torch.empty(rows, o.num_entries, dtype=torch.int32)
        degree = PackedLinks.capacity(keys.shape[1], o.key_degree)
        if queries.is_cuda:
            wide = keys_there if extra is None else lift(keys_there, extra)
            links = self._build_on_gpu(wide, by_query, by_key, degree)
        else:
            links = self._build_on_cpu(keys, by_query, by_key, degree)
        self.links = PackedLinks.pack(links, o.key_degree)
        clock.stage("projection")

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
            o.num_entries,
            self.num_threads,
            links.data_ptr(),
            self.entries.data_ptr(),
        )
        return links

    def _build_on_gpu(self, keys: Tensor, by_query: Tensor, by_key: Tensor, degree: int) -> Tensor:
        from .projection import project  # Triton only where it is used

        o = self.options
        rows, n, _ = keys.shape
        group, m = by_query.shape[1:3]
        links = project(keys, by_query, by_key, degree, min(o.key_degree - o.key_links, degree)).cpu()
        pivots = by_query[..., 0].cpu().contiguous()
        self.repaired_keys = _native.repair(
            pivots.data_ptr(),
            rows,
            group,
            m,
            n,
            degree,
            o.num_entries,
            self.num_threads,
            links.data_ptr(),
            self.entries.data_ptr(),
        )
        return links

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """Best-first search from the entries with a beam of max(ef_search, k); see TokenIndex.search."""
        rows, _, dim = self.keys.shape
        check_search(queries, k, rows, dim)
        group = queries.shape[1]
        asked = asked_vectors(queries, self.extra is not None)
        ids = torch.empty(rows, group, k, dtype=torch.int32)
        scores = torch.empty(rows, group, k)
        keys_scored = torch.empty(rows, group, dtype=torch.int64)
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
            k,
            self.options.ef_search,
            self.num_threads,
            ids.data_ptr(),
            scores.data_ptr(),
            keys_scored.data_ptr(),
            exact,
        )
        return SearchResult(ids, scores, keys_scored)

    @property
    def adjacency(self) -> Tensor:
        """The links as int32 with -1 pads at the end, [R, N, key_degree]; a copy."""
        return self.links.unpack()

    @property
    def nbytes(self) -> int:
        held = [self.links.data, self.entries] + ([self.keys] if self._copied else [])
        return sum(t.nbytes for t in held) + (0 if self._compact is None else self._compact.nbytes)


class _StageClock:
    """Writes the seconds since the stage before into a dict."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds, self._device = seconds, device
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[name] = now - self._last
        self._last = now
