"""The one interface of every token index: which keys does a query want most?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

Index = TypeVar("Index", bound="TokenIndex")


@dataclass
class SearchResult:
    """Keys found for every query head.

    ids: [R, g, k] int32, best first, -1 pads. scores: [R, g, k] float32 inner products (-inf where padded).
    keys_scored: [R, g] int64, every inner product with a key or centroid that the search computed.
    """

    ids: Tensor
    scores: Tensor
    keys_scored: Tensor


class TokenIndex(ABC):
    """Index over the rows R = batch * kv_heads of one layer; g query heads share a row's keys."""

    strategy: ClassVar[str]  # its name in INDEXES
    search_options: ClassVar[frozenset[str]] = frozenset()  # those that a built index may change
    lists_queries: ClassVar[bool] = False  # whether a build makes lists for the queries, on their device
    build_seconds: dict[str, float]  # seconds of the last build by stage

    @abstractmethod
    def build(
        self, keys: Tensor, queries: Tensor, positions: Tensor | None = None, extra: Tensor | None = None
    ) -> None:
        """Indexes keys [R, N, D]; the index refers to them, so they must outlive it and must not change.

        queries [R, g, M, D] are the prompt's own, positions [M] int64 in non-decreasing order: query m sees the keys
        0..positions[m] (negative: none). None: every query sees all. extra [R, N] float32, in CPU memory: one more
        dimension of the keys, in which every query, of the build and of each search, has a 1. Raises ValueError for
        shapes that do not fit.
        """

    def start(
        self,
        keys: Tensor,
        queries: Tensor,
        positions: Tensor | None = None,
        extra: Tensor | None = None,
        keys_there: Tensor | None = None,
    ) -> Callable[[], None]:
        """The part of `build` that the queries' device does; the function returned does the rest, once, in any thread,
        and holds nothing there. keys_there: the keys on that device, contiguous; then `keys` need not have been written
        before the rest begins."""
        self.build(keys, queries, positions, extra)
        return nothing_left

    @abstractmethod
    def expected_bytes(self, rows: int, keys: int, dim: int, dtype: torch.dtype, lifted: bool = False) -> int:
        """About what `nbytes` will be after a build with [rows, keys, dim] keys of this type; lifted: with extra."""

    def build_bytes(self, rows: int, group: int, queries: int, keys: int, dim: int) -> int:
        """Temporaries that a build with [rows, group, queries, dim] queries holds at its peak, at least."""
        return 0

    @abstractmethod
    def insert(
        self,
        keys: Tensor,
        queries: Tensor | None = None,
        positions: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> None:
        """Adds keys that came after the N indexed ones; ids go on from N.

        keys [R, N + n, D], n >= 1: all keys, the indexed ones unchanged in front. The index refers to this tensor from
        now on, as `build` does; usually it is a longer view of the same store. queries [R, g, M, D]: those that saw new
        keys, and every old one; positions [M] and extra [R, N + n] as in `build`, extra if and only if it had one.
        Raises ValueError for shapes that do not fit, before anything changes.
        """

    @abstractmethod
    def search(self, queries: Tensor, k: int, near: Tensor | None = None) -> SearchResult:
        """The k keys of largest inner product with each of queries [R, g, D], as well as the index finds them.

        near [R, g, w] int32 on the CPU, best first, -1 pads at the end: keys that may be close to those wanted, such as
        what the step before found; an index may start from them, those of all g. Raises ValueError for shapes that do
        not fit and ids of no key.
        """

    @property
    @abstractmethod
    def key_bytes(self) -> int:
        """Bytes of one key, or centroid, as `search` reads it."""

    def scored_bytes(self, scored: int, queries: int, k: int) -> int:
        """Bytes behind the `scored` products of searches for k keys by so many queries, as if no two shared a key."""
        return scored * self.key_bytes

    def save(self, path: str | Path) -> str:
        """Writes what the build made, without the keys it refers to, to a new safetensors file; returns its digest.

        Raises FileExistsError where there is a file, OSError where it cannot be written.
        """
        from .persistence import save_index

        return save_index(self, path)

    @classmethod
    def load(
        cls: type[Index],
        path: str | Path,
        keys: Tensor,
        extra: Tensor | None = None,
        num_threads: int | None = None,
        **options: Any,
    ) -> Index:
        """The index of a file, over the keys [R, N, D] (and extra) that it was built for; it finds what that found.

        The file's tensors are mapped, not copied, where the index can use them so. options: in place of the file's;
        those of the build must be the same. Raises ValueError with the reason for a file that is truncated, corrupted,
        of another version or strategy, for other keys, for links that lead nowhere, and for other options of the build.
        """
        from .persistence import load_index

        index = load_index(cls, path, keys, extra, num_threads, options)
        assert isinstance(index, cls)
        return index

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """What `save` writes, and the keys and extra of the build."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor], keys: Tensor, extra: Tensor | None) -> None:
        """In place of `build`: takes the tensors of `state`. ValueError for any that could not come from there."""

    def all_options(self) -> dict[str, Any]:
        """The keywords of the constructor, beside num_threads."""
        return {}

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes the index adds to the KV store: adjacency, entry points and any copy of the keys; `extra` is the
        caller's."""


def nothing_left() -> None:
    """The rest of a build that is done."""


def check_build(keys: Tensor, queries: Tensor, positions: Tensor | None, extra: Tensor | None = None) -> None:
    """Raises ValueError unless keys [R, N, D], queries [R, g, M, D], positions [M] and extra [R, N] fit together."""
    if keys.dim() != 3 or keys.shape[1] == 0:
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, allowed: [R, N, D] with N >= 1")
    if queries.dim() != 4 or (queries.shape[0], queries.shape[3]) != (keys.shape[0], keys.shape[2]):
        raise ValueError(
            f"queries: got shape {tuple(queries.shape)}, allowed: [R, g, M, D] with R, D of keys {tuple(keys.shape)}"
        )
    if extra is not None and (extra.shape != keys.shape[:2] or extra.dtype != torch.float32):
        raise ValueError(
            f"extra: got {extra.dtype} {tuple(extra.shape)}, allowed: torch.float32 {tuple(keys.shape[:2])}"
        )
    if positions is None:
        return
    if positions.shape != (queries.shape[2],):
        raise ValueError(f"positions: got shape {tuple(positions.shape)}, allowed: [{queries.shape[2]}]")
    if bool((positions.diff() < 0).any()):
        raise ValueError("positions: got a decreasing sequence, allowed: non-decreasing positions")


def check_insert(
    keys: Tensor,
    indexed: torch.Size,
    lifted: bool,
    queries: Tensor | None,
    positions: Tensor | None,
    extra: Tensor | None,
) -> None:
    """Raises ValueError unless the arguments of TokenIndex.insert fit an index of keys `indexed` [R, N, D], with one
    more dimension if `lifted`."""
    rows, before, dim = indexed
    if keys.dim() != 3 or (keys.shape[0], keys.shape[2]) != (rows, dim) or keys.shape[1] <= before:
        raise ValueError(
            f"keys: got shape {tuple(keys.shape)}, allowed: [{rows}, N, {dim}] of all keys, N more than the {before} "
            "indexed"
        )
    if (extra is not None) != lifted:
        raise ValueError(f"extra: got {'none' if extra is None else 'one'}, allowed: one if `build` had one, else none")
    check_build(keys, keys.new_empty(rows, 1, 0, dim) if queries is None else queries, None, extra)
    if positions is None:
        return
    if queries is None:
        raise ValueError("positions: got some without queries, allowed: those of the queries")
    check_build(keys, queries, positions, extra)
    if len(positions) and int(positions[0]) < before - 1:
        raise ValueError(f"positions: got {int(positions[0])}, allowed: at least {before - 1}, all indexed keys seen")


def check_search(queries: Tensor, k: int, rows: int, dim: int, near: Tensor | None = None, n: int = 0) -> None:
    """Raises ValueError unless queries are [rows, g, dim], k is positive and near [rows, g, w] names some of n keys."""
    if queries.dim() != 3 or (queries.shape[0], queries.shape[2]) != (rows, dim):
        raise ValueError(f"queries: got shape {tuple(queries.shape)}, allowed: [{rows}, g, {dim}]")
    if k < 1:
        raise ValueError(f"k: got {k}, allowed: >= 1")
    if near is None:
        return
    if near.shape[:-1] != queries.shape[:2] or near.dtype != torch.int32 or near.device.type != "cpu":
        shape = [rows, queries.shape[1], "w"]
        raise ValueError(
            f"near: got {near.dtype} {list(near.shape)} on {near.device}, allowed: torch.int32 {shape}, cpu"
        )
    if near.numel() and not -1 <= int(near.min()) <= int(near.max()) < n:
        raise ValueError(f"near: got ids from {int(near.min())} to {int(near.max())}, allowed: -1 to {n - 1}")


def lift(states: Tensor, extra: Tensor | float) -> Tensor:
    """States [.., D] with one more dimension of `extra`, [..] or the same for all, in float32: [.., D + 1]."""
    if isinstance(extra, Tensor):
        return torch.cat((states.float(), extra.to(states.device)[..., None]), -1)
    return torch.nn.functional.pad(states.float(), (0, 1), value=extra)


def asked_vectors(queries: Tensor, lifted: bool) -> Tensor:
    """Queries [R, g, D] as indexes on the CPU read them: float32, contiguous, with a last 1 if keys are lifted."""
    here = queries.cpu()
    return (lift(here, 1.0) if lifted else here.float()).contiguous()


def pad_topk(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Widens the last dimension to k with -inf and -1."""
    missing = k - scores.shape[-1]
    if missing <= 0:
        return scores, ids
    pad = torch.nn.functional.pad
    return pad(scores, (0, missing), value=float("-inf")), pad(ids, (0, missing), value=-1)
