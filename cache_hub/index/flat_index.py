"""Exact top-k over all keys: the oracle of every comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from .base import SearchResult, TokenIndex, asked_vectors, check_build, check_insert, check_search
from .key_store import as_key_store, stored_key_bytes


class FlatIndex(TokenIndex):
    """Scores every key, in CPU memory, in float32; adds no bytes to the store. knn.exact_topk is the same in torch.

    Keys elsewhere can be built over, saved and restored, but not searched: for who finds them there without an index.
    """

    strategy = "flat"

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or torch.get_num_threads()
        self.build_seconds = {}

    def build(
        self, keys: Tensor, queries: Tensor, positions: Tensor | None = None, extra: Tensor | None = None
    ) -> None:
        """See TokenIndex.build; the queries are not used."""
        check_build(keys, queries, positions, extra)
        self.keys, self.extra = keys, extra

    def state(self) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """See TokenIndex.state: nothing, what matters is that the keys are those."""
        return {}, self.keys, self.extra

    def restore(self, tensors: dict[str, Tensor], keys: Tensor, extra: Tensor | None) -> None:
        """See TokenIndex.restore."""
        self.build(keys, keys[:, None, :0], None, extra)

    def insert(
        self,
        keys: Tensor,
        queries: Tensor | None = None,
        positions: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> None:
        """See TokenIndex.insert; the queries are not used."""
        check_insert(keys, self.keys.shape, self.extra is not None, queries, positions, extra)
        self.keys, self.extra = keys, extra

    def search(self, queries: Tensor, k: int, near: Tensor | None = None) -> SearchResult:
        """See TokenIndex.search; exact, lower ids first among equal scores."""
        rows, n, dim = self.keys.shape
        check_search(queries, k, rows, dim)
        group = queries.shape[1]
        asked = asked_vectors(queries, self.extra is not None)
        ids = torch.full((rows, group, k), -1, dtype=torch.int32)
        scores = torch.full((rows, group, k), float("-inf"))
        store = as_key_store(self.keys, self.extra)
        _native.scan(store, asked.data_ptr(), group, k, self.num_threads, ids.data_ptr(), scores.data_ptr())
        return SearchResult(ids, scores, torch.full((rows, group), n, dtype=torch.int64))

    def expected_bytes(self, rows: int, keys: int, dim: int, dtype: torch.dtype, lifted: bool = False) -> int:
        """See TokenIndex.expected_bytes."""
        return 0

    @property
    def key_bytes(self) -> int:
        return stored_key_bytes(self.keys, self.extra)

    @property
    def nbytes(self) -> int:
        return 0
