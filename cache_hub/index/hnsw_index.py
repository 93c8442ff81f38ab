"""HNSW through faiss, built from the keys alone: RetrievalAttention's baseline "HNSW"."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import HNSWConfig

from .faiss_index import FaissIndex
from .tensor_file import check_ids, take

_STATS = threading.Lock()


class HNSWIndex(FaissIndex):
    """faiss.IndexHNSWFlat with METRIC_INNER_PRODUCT. Options are those of config.HNSWConfig.

    keys_scored is what faiss counts, and its entry point, which it does not. It counts in one variable for the whole
    process, so queries are searched one after another by one thread: the time of a search is no measure of the method.
    """

    strategy = "hnsw"
    search_options = frozenset({"ef_search", "top_k"})
    parallel_search = False

    def __init__(self, num_threads: int | None = None, **options: Any) -> None:
        super().__init__(num_threads)
        self.options = HNSWConfig(**options)

    def all_options(self) -> dict[str, Any]:
        return self.options.model_dump()

    def build_row(self, keys: np.ndarray) -> Any:
        index = self._empty(keys.shape[1])
        index.add(keys)
        return index

    def _empty(self, dim: int) -> Any:
        import faiss

        index = faiss.IndexHNSWFlat(dim, self.options.m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.options.ef_construction
        return index

    def row_state(self, row: Any) -> dict[str, Tensor]:
        """See FaissIndex.row_state: the level of every key [N] (1 is the lowest) and its places for links, one key
        after the other, level by level from the lowest, -1 for none; the entry point. All int32."""
        import faiss

        hnsw = row.hnsw
        neighbors = faiss.rev_swig_ptr(hnsw.neighbors.data(), hnsw.neighbors.size()).copy()
        return {
            "levels": torch.from_numpy(faiss.vector_to_array(hnsw.levels)),
            "neighbors": torch.from_numpy(neighbors),
            "entry": torch.tensor(hnsw.entry_point, dtype=torch.int32),
        }

    def restore_row(self, keys: np.ndarray, state: dict[str, Tensor]) -> Any:
        """See FaissIndex.restore_row; levels, and that every link leads to a key of its level, are checked."""
        import faiss

        n, dim = keys.shape
        levels = take(state, "levels", (n,), torch.int32)
        index = self._empty(dim)
        hnsw, library = index.hnsw, faiss
        places = torch.from_numpy(library.vector_to_array(hnsw.cum_nneighbor_per_level)).long()
        check_ids(levels, "levels", len(places), start=1)
        offsets = torch.nn.functional.pad(places[levels.long()].cumsum(0), (1, 0))
        neighbors = take(state, "neighbors", (int(offsets[-1]),), torch.int32)
        check_ids(neighbors, "neighbors", n)
        place = torch.arange(len(neighbors)) - offsets[:-1].repeat_interleave(places[levels.long()])
        level = torch.bucketize(place, places[1:], right=True)  # counted from 0
        linked = neighbors >= 0
        if bool((levels[neighbors[linked].long()] <= level[linked]).any()):
            raise ValueError("neighbors: got a link to a key that its level does not have, allowed: keys of the level")
        entry, top = take(state, "entry", (), torch.int32), int(levels.max())
        check_ids(entry, "entry", n, start=0)
        if levels[entry] != top:
            raise ValueError(f"entry: got a key of level {levels[entry]}, allowed: one of level {top}, the highest")

        library.downcast_index(index.storage).add(keys)
        index.ntotal = n
        library.copy_array_to_vector(levels.numpy(), hnsw.levels)
        library.copy_array_to_vector(offsets.numpy().astype(np.uint64), hnsw.offsets)
        hnsw.neighbors.resize(len(neighbors))
        library.rev_swig_ptr(hnsw.neighbors.data(), len(neighbors))[:] = neighbors.numpy()
        hnsw.entry_point, hnsw.max_level = int(entry), top - 1
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

    def expected_bytes(self, rows: int, keys: int, dim: int, dtype: torch.dtype, lifted: bool = False) -> int:
        """See TokenIndex.expected_bytes; a key is on 1 / (m - 1) upper levels on average."""
        places = self.options.m * (2 + 1 / (self.options.m - 1))
        return int(rows * keys * 4 * (dim + lifted + places + 3))

    def row_bytes(self, row: Any) -> int:
        """The float32 copy of the keys, all places for links (4 bytes each) on all levels, and each key's level (4
        bytes) and first place (8)."""
        hnsw = row.hnsw
        return row.ntotal * row.d * 4 + hnsw.neighbors.size() * 4 + hnsw.levels.size() * 4 + hnsw.offsets.size() * 8
