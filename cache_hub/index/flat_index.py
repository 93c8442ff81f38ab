"""Exact top-k over all keys: the oracle of every comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SearchResult, TokenIndex, check_build, check_search
from .knn import exact_topk


class FlatIndex(TokenIndex):
    """Scores every key in float32 on the keys' device; adds no bytes to the store."""

    def __init__(self) -> None:
        self.build_seconds = {}

    def build(self, keys: Tensor, queries: Tensor, positions: Tensor | None = None) -> None:
        """See TokenIndex.build; the queries are not used."""
        check_build(keys, queries, positions)
        self.keys = keys

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """See TokenIndex.search; exact."""
        rows, n, dim = self.keys.shape
        check_search(queries, k, rows, dim)
        scores, ids = exact_topk(self.keys, queries.to(self.keys.device), k)
        return SearchResult(ids, scores, torch.full(queries.shape[:2], n, dtype=torch.int64))

    @property
    def nbytes(self) -> int:
        return 0
