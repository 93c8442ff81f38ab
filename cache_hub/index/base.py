"""The one interface of every token index: which keys does a query want most?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


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
    def search(self, queries: Tensor, k: int) -> SearchResult:
        """The k keys of largest inner product with each of queries [R, g, D], as well as the index finds them."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes the index adds to the KV store: adjacency, entry points and any copy of the keys; `extra` is the
        caller's."""


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


def check_search(queries: Tensor, k: int, rows: int, dim: int) -> None:
    """Raises ValueError unless queries are [rows, g, dim] and k is positive."""
    if queries.dim() != 3 or (queries.shape[0], queries.shape[2]) != (rows, dim):
        raise ValueError(f"queries: got shape {tuple(queries.shape)}, allowed: [{rows}, g, {dim}]")
    if k < 1:
        raise ValueError(f"k: got {k}, allowed: >= 1")


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
