"""HNSW through faiss, built from the keys alone: RetrievalAttention's baseline "HNSW"."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from config import HNSWConfig

from .faiss_index import FaissIndex

_STATS = threading.Lock()


class HNSWIndex(FaissIndex):
    """faiss.IndexHNSWFlat with METRIC_INNER_PRODUCT. Options are those of config.HNSWConfig.

    keys_scored is what faiss counts, and its entry point, which it does not. It counts in one variable for the whole
    process, so queries are searched one after another by one thread: the time of a search is no measure of the method.
    """

    parallel_search = False

    def __init__(self, num_threads: int | None = None, **options: Any) -> None:
        super().__init__(num_threads)
        self.options = HNSWConfig(**options)

    def build_row(self, keys: np.ndarray) -> Any:
        import faiss

        index = faiss.IndexHNSWFlat(keys.shape[1], self.options.m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.options.ef_construction
        index.add(keys)
        return index

    def add_to_row(self, row: Any, keys: np.ndarray) -> None:
        row.add(keys)

    def search_row(self, row: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See FaissIndex.search_row."""
        import faiss

        scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        keys_scored = np.empty(len(queries), np.int64)
        library: Any = faiss  # its type stubs lack what follows
        stats = library.cvar.hnsw_stats
        # Where k is larger, faiss keeps k candidates, but stops as soon as the best efSearch of them are spent.
        beam = library.SearchParametersHNSW(efSearch=max(self.options.ef_search, k))
        for head in range(len(queries)):
            one = slice(head, head + 1)
            with _STATS:
                stats.reset()
                row.search(queries[one], k, params=beam, D=scores[one], I=ids[one])
                keys_scored[head] = stats.ndis + 1
        return scores, ids, keys_scored

    def row_bytes(self, row: Any) -> int:
        """The float32 copy of the keys, all places for links (4 bytes each) on all levels, and each key's level (4
        bytes) and first place (8)."""
        hnsw = row.hnsw
        return row.ntotal * row.d * 4 + hnsw.neighbors.size() * 4 + hnsw.levels.size() * 4 + hnsw.offsets.size() * 8
