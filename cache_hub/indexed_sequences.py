"""Sequences that were prefilled together, and the index over their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .index import SearchResult, TokenIndex, _native
from .lift import SoftmaxLift


@dataclass
class IndexedSequences:
    """`count` sequences from `start` on, equally long, whose tokens first..stop - 1 are in the index.

    index: its rows are sequence-major, [count * Hkv]. lift: its sampler, where there is one. query_moment
    [count * Hkv, D, D]: see CentroidTail.add. hits [count * Hkv, g, k] int32 on the CPU: what the step before found.
    """

    start: int
    count: int
    first: int
    stop: int
    index: TokenIndex
    lift: SoftmaxLift | None
    query_moment: Tensor
    hits: Tensor | None = None

    @property
    def sequences(self) -> slice:
        return slice(self.start, self.start + self.count)

    def tokens(self, store: Tensor) -> Tensor:
        """The indexed tokens' rows [count, Hkv, N, D] of a store [B, Hkv, L, D]; copies nothing."""
        return store[self.sequences, :, self.first : self.stop]

    def retrieve(
        self, queries: Tensor, k: int, warm_start: int, positions: Tensor, log_weights: Tensor | None
    ) -> tuple[SearchResult, int, int]:
        """What the index finds for queries [count * Hkv, g, D], k a query head. Writes the tokens to attend to, each
        group's union, into positions [count, Hkv, g * k] int32 on the CPU, contiguous, with -1 pads, and where there is
        a sampler their log weights likewise. Returns also how many tokens that are, and the places that may hold any.
        warm_start: hits of the step before that the search may start from.
        """
        near = None if self.hits is None or not warm_start else self.hits[..., :warm_start]
        if self.lift is None or log_weights is None:
            found = self.index.search(queries, k, near)
            ids = self.hits = found.ids.cpu().contiguous()
            counts = _native.unite(ids.data_ptr(), len(ids), ids[0].numel(), self.first, positions.data_ptr())
            return found, sum(counts), max(counts)
        sample, found = self.lift.search(queries, k, near)
        self.hits = found.ids.cpu()
        positions[:] = torch.where(sample.ids >= 0, sample.ids + self.first, -1).view_as(positions)
        log_weights[:] = sample.log_weights.view_as(log_weights)
        return found, int((sample.ids >= 0).sum()), positions.shape[2]

    def insert(self, store: Tensor, tokens: int, queries: Tensor, asked_from: int) -> None:
        """Takes up the `tokens` behind those indexed. queries [M, B, H, D] of consecutive positions from asked_from on,
        those that saw them."""
        self.stop += tokens
        keys = self.tokens(store).flatten(0, 1)
        asked = self.by_row(queries, len(keys) // self.count)
        positions = torch.arange(len(queries)) + (asked_from - self.first)
        (self.lift or self.index).insert(keys, asked, positions)

    def by_row(self, queries: Tensor, kv_heads: int) -> Tensor:
        """These sequences' queries of [M, B, H, D], [count * Hkv, g, M, D]."""
        own = queries[:, self.sequences].permute(1, 2, 0, 3)
        return own.reshape(self.count * kv_heads, -1, *own.shape[2:])


class LatestQueries:
    """The queries [B, H, D] of a layer's last `steps` decode steps, and never of more. Every `steps` steps, `turn`
    steps late, it is the layer's turn; batches: how often it was."""

    def __init__(self, steps: int, turn: int) -> None:
        self._steps, self._turn = steps, turn
        self._ring: Tensor | None = None
        self.batches = 0

    def put(self, step: int, query: Tensor) -> Tensor | None:
        """Takes those [B, 1, H, D] of decode step `step`, counted from 1 on. Where it is the layer's turn, all that are
        kept [steps, B, H, D], oldest first."""
        if self._ring is None:
            self._ring = query.new_empty(self._steps, *query[:, 0].shape)
        self._ring[(step - 1) % self._steps] = query[:, 0]
        if step < (self.batches + 1) * self._steps + self._turn:
            return None
        self.batches += 1
        return self._ring.roll(-(step % self._steps), 0)
