"""HNSW through hnswlib, where that is installed: a second implementation to compare times with."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_hub.index import SearchResult
from config import HNSWConfig

_SEED = 100


def is_installed() -> bool:
    return importlib.util.find_spec("hnswlib") is not None


class HnswlibIndex:
    """hnswlib.Index by inner product with the parameters of config.HNSWConfig; built and searched as a TokenIndex.

    hnswlib does not tell how many products a search computes: keys_scored is 0.
    """

    def __init__(self, num_threads: int = 1, **options: Any) -> None:
        self.options, self.num_threads = HNSWConfig(**options), num_threads

    def build(self, keys: Tensor, queries: Tensor, positions: Tensor | None = None) -> None:
        """From keys [R, N, D] alone."""
        import hnswlib

        self._rows = []
        for row in keys.float().numpy():
            index = hnswlib.Index(space="ip", dim=row.shape[1])
            o = self.options
            index.init_index(max_elements=len(row), M=o.m, ef_construction=o.ef_construction, random_seed=_SEED)
            index.add_items(row, num_threads=self.num_threads)
            self._rows.append(index)

    def search(self, queries: Tensor, k: int, near: Tensor | None = None) -> SearchResult:
        """See TokenIndex.search; queries [R, g, D]."""
        ids, scores = [], []
        for index, asked in zip(self._rows, queries.float().numpy(), strict=True):
            index.set_ef(max(self.options.ef_search, k))
            found, distances = index.knn_query(asked, k, num_threads=self.num_threads)
            ids.append(found.astype(np.int32))
            scores.append(1 - distances)
        scored = torch.zeros(queries.shape[:2], dtype=torch.int64)
        return SearchResult(torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(scores)), scored)
