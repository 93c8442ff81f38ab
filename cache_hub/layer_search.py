"""The host's part of a layer's decode step: searches for all sequences, and what the device needs of their results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .index import AttentionAwareGraphIndex, _native
from .indexed_sequences import IndexedSequences
from .tail import CentroidTail


@dataclass(frozen=True)
class HostBuffers:
    """What device and host hand each other in the steps of one device's layers, one layer after the other; pinned
    beside a GPU.

    queries [B * Hkv, g, D] float32; positions [B, Hkv, g * k] int32 of the tokens to attend to, clusters likewise, of
    their clusters, -1 pads; log_weights [B, Hkv, g * k] float32 where tokens are a weighted sample.

    Where searches begin before their queries are there: foreseen [2, B * Hkv, g, D], what the queries of even and of
    odd layers will be about; and beside a GPU posted, like queries, where they are waited for. In both, what has not
    come is the NaN of all bits set.
    """

    queries: Tensor
    positions: Tensor
    clusters: Tensor
    log_weights: Tensor | None
    foreseen: Tensor | None = None
    posted: Tensor | None = None

    @property
    def inbox(self) -> Tensor:
        """Where a device writes its queries."""
        return self.queries if self.posted is None else self.posted

    @classmethod
    def of(
        cls, batch: int, kv_heads: int, group: int, head_dim: int, k: int, pinned: bool, lifted: bool, foresees: bool
    ) -> HostBuffers:
        places, asked = (batch, kv_heads, group * k), (batch * kv_heads, group, head_dim)
        positions, clusters = (torch.full(places, -1, dtype=torch.int32, pin_memory=pinned) for _ in range(2))
        weights = torch.zeros(places, pin_memory=pinned) if lifted else None
        queries = torch.zeros(asked, pin_memory=pinned)
        if not foresees:
            return cls(queries, positions, clusters, weights)
        foreseen, posted = (
            torch.full(shape, -1, dtype=torch.int32, pin_memory=pinned).view(torch.float32)
            for shape in ((2, *asked), asked)
        )
        return cls(queries, positions, clusters, weights, foreseen, posted if pinned else None)


@dataclass(frozen=True)
class Foreseen:
    """What the queries will be about, [B * Hkv, g, D] float32, and the beam width of the searches that go on for the
    queries."""

    queries: Tensor
    ef: int


@dataclass(frozen=True)
class Found:
    """What was found for the rows of some sequences: ids [R, g, k] int32, best first, -1 pads; keys_scored [R, g]
    int64."""

    ids: Tensor
    keys_scored: Tensor


class LayerSearch:
    """Of one layer, for sequences that any index serves, one after the other.

    k: tokens a query head; warm_start: hits of the step before, for each query head, that a search may start from.
    """

    def __init__(self, groups: Sequence[IndexedSequences], k: int, warm_start: int, tail: CentroidTail | None) -> None:
        self.groups, self.k, self.warm_start, self.tail = groups, k, warm_start, tail
        self._hits: list[Tensor | None] = [None] * len(groups)
        self._found: list[Found] = []
        self.waited = 0.0  # seconds of the last step

    def begin(self, buffers: HostBuffers, foreseen: Foreseen | None) -> None:
        """Lets other threads begin with what `retrieve` will be called for next, where there are any."""

    def retrieve(self, buffers: HostBuffers, foreseen: Foreseen | None = None) -> tuple[int, int] | None:
        """Writes what the queries in the buffers want behind them; how many keys were scored, and how many tokens the
        kv heads attend to. None where the queries are posted, and did not come for long: then it may be called again.
        """
        self._found, attended = [], 0
        for number, group in enumerate(self.groups):
            near = self._hits[number]
            found, tokens = self._search(group, buffers, None if near is None else near[..., : self.warm_start])
            self._hits[number] = found.ids
            self._found.append(found)
            attended += tokens
            if self.tail is not None:
                positions = buffers.positions[group.sequences]
                buffers.clusters[group.sequences] = self.tail.clusters_of(positions, group.first, group.sequences)
        return sum(int(one.keys_scored.sum()) for one in self._found), attended

    def _search(self, group: IndexedSequences, buffers: HostBuffers, near: Tensor | None) -> tuple[Found, int]:
        """What the index finds for the group's queries, and how many tokens. Writes positions of each kv head's union,
        or of its sample with the log weights."""
        kv_heads = buffers.positions.shape[1]
        queries, positions = buffers.queries[group.rows(kv_heads)], buffers.positions[group.sequences]
        near = near if near is not None and near.shape[2] else None
        if group.lift is None or buffers.log_weights is None:
            result = group.index.search(queries, self.k, near)
            ids = result.ids.cpu().contiguous()
            counts = _native.unite(ids.data_ptr(), len(ids), ids[0].numel(), group.first, positions.data_ptr())
            return Found(ids, result.keys_scored), sum(counts)
        sample, result = group.lift.search(queries, self.k, near)
        positions[:] = torch.where(sample.ids >= 0, sample.ids + group.first, -1).view_as(positions)
        buffers.log_weights[group.sequences] = sample.log_weights.view_as(positions)
        return Found(result.ids.cpu(), result.keys_scored), int((sample.ids >= 0).sum())

    def found(self) -> list[Found]:
        """Of the last step, by groups."""
        return self._found

    def forget(self) -> None:
        """The step before is no longer one to start from."""
        self._hits = [None] * len(self.groups)

    def refresh(self) -> None:
        """The indexes, or the tail, have grown."""


class GraphLayerSearch(LayerSearch):
    """As LayerSearch, for graphs over consecutive sequences: all searches and unions by one call of native code."""

    def __init__(self, groups: Sequence[IndexedSequences], k: int, warm_start: int, tail: CentroidTail | None) -> None:
        super().__init__(groups, k, warm_start, tail)
        self._views: list[_native.GraphView] = []
        self._ids = torch.empty(2, 0)  # of this step and of the one before, in turns: [2, R, g, k] int32
        self._keys_scored = torch.empty(0)
        self._steps = 0
        self._running: _native.Retrieving | None = None

    def begin(self, buffers: HostBuffers, foreseen: Foreseen | None) -> None:
        group, kv_heads = buffers.queries.shape[1], buffers.positions.shape[1]
        if not self._views:
            self._views = [self._view(one) for one in self.groups]
        if self._ids.dim() == 2:
            count = sum(one.count for one in self.groups) * kv_heads
            self._ids = torch.full((2, count, group, self.k), -1, dtype=torch.int32)
            self._keys_scored = torch.zeros(count, group, dtype=torch.int64)
        first = self.groups[0]
        index = first.index
        assert isinstance(index, AttentionAwareGraphIndex)
        this = self._steps % 2
        near = self._ids[1 - this].data_ptr() if self._steps and self.warm_start else 0
        begin, rows = slice(first.start, None), slice(first.start * kv_heads, None)
        self._running = _native.Retrieving(
            self._views,
            buffers.queries[rows].data_ptr(),
            group,
            near,
            self.k,
            min(self.warm_start, self.k) if near else 0,
            self.k,
            index.options.ef_search if foreseen is None else foreseen.ef,
            index.num_threads,
            self._ids[this].data_ptr(),
            self._keys_scored.data_ptr(),
            buffers.positions[begin].data_ptr(),
            buffers.clusters[begin].data_ptr() if self.tail is not None else 0,
            0 if buffers.posted is None else buffers.posted[rows].data_ptr(),
            0 if foreseen is None else foreseen.queries[rows].data_ptr(),
            index.options.ef_search,
        )

    def retrieve(self, buffers: HostBuffers, foreseen: Foreseen | None = None) -> tuple[int, int] | None:
        if self._running is None:
            self.begin(buffers, foreseen)
        assert self._running is not None
        scored, attended, waited = self._running.finish()
        self._running = None
        self.waited = waited * 1e-9
        if attended < 0:
            return None
        self._steps += 1
        return scored, attended

    def _view(self, group: IndexedSequences) -> _native.GraphView:
        assert isinstance(group.index, AttentionAwareGraphIndex)
        if self.tail is None:
            return group.index.view(group.first)
        return group.index.view(group.first, self.tail.assignment[group.sequences].flatten(0, 1))

    def found(self) -> list[Found]:
        counts = [group.count * (len(self._keys_scored) // sum(g.count for g in self.groups)) for group in self.groups]
        ids = self._ids[(self._steps - 1) % 2]
        return [Found(*both) for both in zip(ids.split(counts), self._keys_scored.split(counts), strict=True)]

    def forget(self) -> None:
        self._steps = 0

    def refresh(self) -> None:
        self._views = []


def layer_search(groups: Sequence[IndexedSequences], k: int, warm_start: int, tail: CentroidTail | None) -> LayerSearch:
    """The fastest that serves the groups."""
    graphs = all(isinstance(group.index, AttentionAwareGraphIndex) and group.lift is None for group in groups)
    consecutive = all(a.start + a.count == b.start for a, b in itertools.pairwise(groups))
    kind = GraphLayerSearch if graphs and consecutive else LayerSearch
    return kind(groups, k, warm_start, tail)
