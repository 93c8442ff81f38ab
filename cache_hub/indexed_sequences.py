"""Sequences that were prefilled together, and the index over their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .index import TokenIndex, _native
from .lift import SoftmaxLift


@dataclass(frozen=True)
class HostBuffers:
    """What device and host hand each other in the steps of one device's layers, one layer after the other; pinned
    beside a GPU.

    queries [B * Hkv, g, D] float32; positions [B, Hkv, g * k] int32 of the tokens to attend to, clusters likewise, of
    their clusters, -1 pads; log_weights [B, Hkv, g * k] float32 where tokens are a weighted sample.
    """

    queries: Tensor
    positions: Tensor
    clusters: Tensor
    log_weights: Tensor | None

    @classmethod
    def of(
        cls, batch: int, kv_heads: int, group: int, head_dim: int, k: int, pinned: bool, lifted: bool
    ) -> HostBuffers:
        places = (batch, kv_heads, group * k)
        positions, clusters = (torch.full(places, -1, dtype=torch.int32, pin_memory=pinned) for _ in range(2))
        queries = torch.zeros(batch * kv_heads, group, head_dim, pin_memory=pinned)
        return cls(queries, positions, clusters, torch.zeros(places, pin_memory=pinned) if lifted else None)


@dataclass(frozen=True)
class Found:
    """What a search found for the rows of some sequences: ids [R, g, k] int32, best first, -1 pads; keys_scored [R, g]
    int64; attended: how many tokens their groups attend to, all rows together."""

    ids: Tensor
    keys_scored: Tensor
    attended: int


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

    def rows(self, kv_heads: int) -> slice:
        """Of all sequences' kv heads, those of these sequences."""
        return slice(self.start * kv_heads, (self.start + self.count) * kv_heads)

    def tokens(self, store: Tensor) -> Tensor:
        """The indexed tokens' rows [count, Hkv, N, D] of a store [B, Hkv, L, D]; copies nothing."""
        return store[self.sequences, :, self.first : self.stop]

    def retrieve(self, buffers: HostBuffers, k: int, warm_start: int) -> Found:
        """Writes what the index finds for the queries, k a query head, into the buffers: positions of each group's
        union, or of its sample with the log weights. warm_start: hits of the step before that the search may start
        from."""
        kv_heads = buffers.positions.shape[1]
        queries, positions = buffers.queries[self.rows(kv_heads)], buffers.positions[self.sequences]
        near = None if self.hits is None or not warm_start else self.hits[..., :warm_start]
        if self.lift is None or buffers.log_weights is None:
            found = self.index.search(queries, k, near)
            ids = self.hits = found.ids.cpu().contiguous()
            counts = _native.unite(ids.data_ptr(), len(ids), ids[0].numel(), self.first, positions.data_ptr())
            return Found(ids, found.keys_scored, sum(counts))
        sample, found = self.lift.search(queries, k, near)
        self.hits = found.ids.cpu()
        positions[:] = torch.where(sample.ids >= 0, sample.ids + self.first, -1).view_as(positions)
        buffers.log_weights[self.sequences] = sample.log_weights.view_as(positions)
        return Found(self.hits, found.keys_scored, int((sample.ids >= 0).sum()))

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
        if step < (self.batches + 1) * self._steps + self._turn:
            return None
        self.batches += 1
        return self._ring.roll(-(step % self._steps), 0)
