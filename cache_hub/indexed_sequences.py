"""Sequences that were prefilled together, and the index over their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .index import TokenIndex
from .lift import SoftmaxLift


@dataclass
class IndexedSequences:
    """`count` sequences from `start` on, equally long, whose tokens first..stop - 1 are in the index.

    index: its rows are sequence-major, [count * Hkv]. lift: its sampler, where there is one. query_moment
    [count * Hkv, D, D]: see CentroidTail.add.
    """

    start: int
    count: int
    first: int
    stop: int
    index: TokenIndex
    lift: SoftmaxLift | None
    query_moment: Tensor

    @property
    def sequences(self) -> slice:
        return slice(self.start, self.start + self.count)

    def rows(self, kv_heads: int) -> slice:
        """Of all sequences' kv heads, those of these sequences."""
        return slice(self.start * kv_heads, (self.start + self.count) * kv_heads)

    def tokens(self, store: Tensor) -> Tensor:
        """The indexed tokens' rows [count, Hkv, N, D] of a store [B, Hkv, L, D]; copies nothing."""
        return store[self.sequences, :, self.first : self.stop]

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
    """The queries [B, H, D] of a layer's last `steps` decode steps, and never of more, in CPU memory. Every `steps`
    steps, `turn` steps late, it is the layer's turn; batches: how often it was."""

    def __init__(self, steps: int, turn: int) -> None:
        self._steps, self._turn = steps, turn
        self._ring: Tensor | None = None
        self.batches = 0

    def put(self, step: int, query: Tensor) -> Tensor | None:
        """Takes those [B, H, D] of decode step `step`, counted from 1 on. Where it is the layer's turn, all that are
        kept [steps, B, H, D], oldest first."""
        if self._ring is None:
            self._ring = query.new_empty(self._steps, *query.shape)
        self._ring[(step - 1) % self._steps] = query
        return self._ring.roll(-(step % self._steps), 0) if self.due(step) else None

    def due(self, step: int) -> bool:
        """Whether it is the layer's turn with decode step `step`; if so, counts it."""
        turns = step >= (self.batches + 1) * self._steps + self._turn
        self.batches += turns
        return turns
