"""What the indexes that faiss builds have in common: one faiss index a row, over a float32 copy of the keys."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import SearchResult, TokenIndex, asked_vectors, check_build, check_insert, check_search, lift
from .knn import in_parallel

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FaissIndex(TokenIndex):
    """One index a row R, built from the keys alone: queries and positions are checked and not used.

    The rows are built side by side, each by one thread, so that the result is the same for any num_threads. faiss reads
    float32 and keeps its own copy of the keys, which nbytes counts.
    """

    parallel_search = True  # by rows

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or torch.get_num_threads()
        self.build_seconds = {}

    def build(
        self, keys: Tensor, queries: Tensor, positions: Tensor | None = None, extra: Tensor | None = None
    ) -> None:
        """See TokenIndex.build. Raises ValueError for keys that are not float32, float16 or bfloat16 in CPU memory."""
        check_build(keys, queries, positions, extra)
        _check_keys(keys)
        begin = time.perf_counter()
        self._make_rows(keys, extra, lambda row, vectors: self.build_row(vectors))
        self.build_seconds["index"] = time.perf_counter() - begin

    def _make_rows(self, keys: Tensor, extra: Tensor | None, make: Callable[[int, np.ndarray], Any]) -> None:
        self._keys, self._extra = keys, extra
        self._rows: list[Any] = [None] * len(keys)

        def work(row: int) -> None:
            self._rows[row] = make(row, _vectors(keys, extra, row, 0))

        in_parallel(work, [(row,) for row in range(len(keys))], keys.device, self.num_threads)

    def insert(
        self,
        keys: Tensor,
        queries: Tensor | None = None,
        positions: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> None:
        """See TokenIndex.insert; the queries are not used."""
        check_insert(keys, self._keys.shape, self._extra is not None, queries, positions, extra)
        _check_keys(keys)

        def work(row: int) -> None:
            self.add_to_row(self._rows[row], _vectors(keys, extra, row, self._keys.shape[1]))

        in_parallel(work, [(row,) for row in range(len(keys))], keys.device, self.num_threads)
        self._keys, self._extra = keys, extra

    def state(self) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """See TokenIndex.state: of every row what row_state gives, without faiss's copy of the keys."""
        tensors: dict[str, Tensor] = {}
        for row, built in enumerate(self._rows):
            tensors |= {f"{name}.{row}": tensor for name, tensor in self.row_state(built).items()}
        return tensors, self._keys, self._extra

    def restore(self, tensors: dict[str, Tensor], keys: Tensor, extra: Tensor | None) -> None:
        """See TokenIndex.restore; faiss makes its copy of the keys again, which is all the work there is."""
        by_row: dict[str, dict[str, Tensor]] = {str(row): {} for row in range(len(keys))}
        for full_name, tensor in tensors.items():
            name, _, row = full_name.rpartition(".")
            by_row.setdefault(row, {})[name] = tensor
        self._make_rows(keys, extra, lambda row, vectors: self.restore_row(vectors, by_row[str(row)]))

    def search(self, queries: Tensor, k: int, near: Tensor | None = None) -> SearchResult:
        """See TokenIndex.search."""
        check_search(queries, k, len(self._rows), self._keys.shape[2])
        asked = asked_vectors(queries, self._extra is not None).numpy()
        shape = (*queries.shape[:2], k)
        ids, scores = np.empty(shape, np.int32), np.empty(shape, np.float32)
        keys_scored = np.empty(shape[:2], np.int64)

        def work(row: int) -> None:
            scores[row], ids[row], keys_scored[row] = self.search_row(self._rows[row], asked[row], k)

        if self.parallel_search:
            in_parallel(work, [(row,) for row in range(len(asked))], torch.device("cpu"), self.num_threads)
        else:
            for row in range(len(asked)):
                work(row)
        scores[ids < 0] = -np.inf
        return SearchResult(torch.from_numpy(ids), torch.from_numpy(scores), torch.from_numpy(keys_scored))

    def build_bytes(self, rows: int, group: int, queries: int, keys: int, dim: int) -> int:
        """See TokenIndex.build_bytes; the keys of one row in float32."""
        return 4 * keys * dim

    @property
    def key_bytes(self) -> int:
        return 4 * (self._keys.shape[2] + (self._extra is not None))

    @property
    def nbytes(self) -> int:
        return sum(self.row_bytes(row) for row in self._rows)

    @abstractmethod
    def build_row(self, keys: np.ndarray) -> Any:
        """The index of keys [N, D] float32, in a form of the class's own."""

    @abstractmethod
    def add_to_row(self, row: Any, keys: np.ndarray) -> None:
        """Adds keys [n, D] float32 behind those that the row has."""

    @abstractmethod
    def row_state(self, row: Any) -> dict[str, Tensor]:
        """Tensors of one row from which restore_row makes it again, without a copy of the keys."""

    @abstractmethod
    def restore_row(self, keys: np.ndarray, state: dict[str, Tensor]) -> Any:
        """One row over the keys [N, D] float32 of its build. ValueError for a state that does not fit them."""

    @abstractmethod
    def search_row(self, row: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores and ids [g, k], best first, ids -1 where there are fewer, and the products computed [g]."""

    @abstractmethod
    def row_bytes(self, row: Any) -> int:
        """Bytes of one row: its copy of the keys and everything beside it."""


def _check_keys(keys: Tensor) -> None:
    if keys.device.type != "cpu" or keys.dtype not in _DTYPES:
        raise ValueError(
            f"keys: got {keys.dtype} on {keys.device}, allowed: float32, float16 or bfloat16 in CPU memory"
        )


def _vectors(keys: Tensor, extra: Tensor | None, row: int, first: int) -> np.ndarray:
    """Keys of a row from `first` on as faiss reads them: [n, D] float32, or [n, D + 1]."""
    states = keys[row, first:]
    return (states.float() if extra is None else lift(states, extra[row, first:])).contiguous().numpy()
