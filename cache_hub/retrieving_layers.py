"""The decode steps of a cache of retrieved tokens, in the stages of a StagedCache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_hub import WeightedPart, decode_splits, post

from .diagnosis import agreement_with_exact
from .growing_layers import GrowingLayers
from .layer_search import Foreseen, Found, GraphLayerSearch, HostBuffers, LayerSearch, layer_search
from .stats import Agreement
from .tail import CentroidTail

if TYPE_CHECKING:
    from attn_hub.kernels.weighted_decode import TritonSplits
    from attn_hub.reference import ReferenceSplits


class RetrievingLayers(GrowingLayers):
    """The part of TokenIndexCache that decodes: while the host searches, static tokens and clusters are attended to;
    then what the search found.
    """

    top_k: int
    warm_start: int
    resume_ef: int
    estimation_budget: float

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self._buffers: dict[torch.device, HostBuffers] = {}
        self._searches: dict[int, LayerSearch] = {}
        self._retrieved: dict[int, tuple[int, int]] = {}  # keys scored and tokens found in the last step, by layer
        self._chosen: Tensor | None = None  # clusters that the layer begun last attends to, where that is not all

    def needs_host(self, layer_idx: int) -> bool:
        return bool(self._groups[layer_idx])

    def _buffers_of(self, layer_idx: int) -> HostBuffers:
        device = self.devices[layer_idx]
        if device not in self._buffers:
            sizes = (self.batch_size, self.kv_head, self.group_size, self.head_dim, self.top_k)
            lifted, foresees = self.estimation == "softmax_lift", self._begins_early(layer_idx)
            self._buffers[device] = HostBuffers.of(*sizes, device.type == "cuda", lifted, foresees)
        return self._buffers[device]

    def _begins_early(self, layer_idx: int) -> bool:
        """Whether searches for the layer can wait for their queries, and begin with what is foreseen."""
        return self.resume_ef > 0 and isinstance(self._search_of(layer_idx), GraphLayerSearch)

    def foresees(self, layer_idx: int) -> bool:
        return self.devices[layer_idx].type == "cuda" and self.needs_host(layer_idx) and self._begins_early(layer_idx)

    def post_foreseen(self, query_states: Tensor, layer_idx: int) -> None:
        foreseen = self._buffers_of(layer_idx).foreseen
        assert foreseen is not None
        post(query_states, foreseen[layer_idx % 2])

    def _tail_of(self, layer_idx: int) -> CentroidTail | None:
        return self._tails[layer_idx] if self.estimation == "centroid" else None

    def expect_query(self, layer_idx: int) -> None:
        if self.waits_for_query(layer_idx):
            self._search_of(layer_idx).begin(self._buffers_of(layer_idx), self._foreseen(layer_idx))

    def _foreseen(self, layer_idx: int) -> Foreseen | None:
        foreseen = self._buffers_of(layer_idx).foreseen
        return None if foreseen is None else Foreseen(foreseen[layer_idx % 2], self.resume_ef)

    def waits_for_query(self, layer_idx: int) -> bool:
        return self._buffers_of(layer_idx).posted is not None

    def post_query(self, query_states: Tensor, layer_idx: int) -> None:
        post(query_states, self._buffers_of(layer_idx).inbox)

    def begin(self, query_states: Tensor, layer_idx: int) -> ReferenceSplits | TritonSplits:
        """Attends to the static tokens and the clusters, as if nothing were retrieved."""
        parts = [self._zones[layer_idx].part()]
        ready = 1
        if self._groups[layer_idx]:
            tail, buffers = self._tail_of(layer_idx), self._buffers_of(layer_idx)
            stores = self._keys[layer_idx], self._values[layer_idx]
            retrieved = WeightedPart(*stores, buffers.positions, buffers.log_weights)
            if tail is not None:
                clusters, self._chosen = tail.part(query_states)
                parts.append(clusters)
                ready += 1
                retrieved.stand_ins, retrieved.stand_in_ids = tail.centroids, buffers.clusters
            parts.append(retrieved)
        begun = decode_splits(query_states, parts)
        begun.attend(ready)
        return begun

    def _search_of(self, layer_idx: int) -> LayerSearch:
        if layer_idx not in self._searches:
            how = (self.top_k, self.warm_start, self._tail_of(layer_idx))
            self._searches[layer_idx] = layer_search(self._groups[layer_idx], *how)
        return self._searches[layer_idx]

    def retrieve(self, layer_idx: int, arrived: torch.cuda.Event | None, foreseen: bool) -> None:
        buffers, search, stats = self._buffers_of(layer_idx), self._search_of(layer_idx), self.stats
        if arrived is not None:
            with stats.timed("wait"):
                arrived.synchronize()
        hint = self._foreseen(layer_idx) if foreseen else None
        with stats.timed("search"):
            retrieved = search.retrieve(buffers, hint)
            if retrieved is None:  # behind a prefill, say, which the device has not done yet
                torch.cuda.synchronize(self.devices[layer_idx])
                retrieved = search.retrieve(buffers, hint)
        if retrieved is None:
            raise RuntimeError(f"layer {layer_idx}: the query was not posted, or not all of it")
        self._retrieved[layer_idx] = retrieved
        stats.seconds["search"] -= search.waited
        stats.seconds["wait"] += search.waited
        if self.stats.agreement is not None:
            with self.stats.timed("diagnosis"):
                self._compare(buffers.queries, search.found(), layer_idx, self.stats.agreement)
        self.keep_query(buffers.queries.view(self.batch_size, self.num_heads, self.head_dim), layer_idx)

    def end(self, begun: ReferenceSplits | TritonSplits, layer_idx: int) -> Tensor:
        retrieved = begun.parts[-1]
        if retrieved.stand_in_ids is not None and self._chosen is not None:
            ids = retrieved.stand_in_ids.to(self._chosen.device, non_blocking=True)
            there = self._chosen.gather(2, ids.clamp(min=0).long()) & (ids >= 0)
            retrieved.stand_in_ids = torch.where(there, ids, -1)
        return begun.merge()

    def captured(self, layer_idx: int) -> tuple[int, ...]:
        zone, tail = self._zones[layer_idx], self._tail_of(layer_idx)
        held = [zone.keys, self._keys[layer_idx]]
        if self._groups[layer_idx]:
            buffers = self._buffers_of(layer_idx)
            held += [buffers.positions, buffers.inbox]
        if tail is not None:
            held += [tail.centroids, *([tail.wanted()] if tail.share < 1 else [])]
        return tuple(tensor.data_ptr() for tensor in held)

    def note_step(self, layer_idx: int) -> None:
        stats, context = self.stats, sum(self.context_lengths(layer_idx))
        stats.attended += sum(self._zones[layer_idx].counts) * self.kv_head
        stats.attended_of += context * self.kv_head
        stats.scored_of += context * self.num_heads
        groups, tail = self._groups[layer_idx], self._tail_of(layer_idx)
        if not groups:
            return
        scored, attended = self._retrieved[layer_idx]
        queries = sum(group.count for group in groups) * self.num_heads
        stats.scored += scored
        stats.scored_bytes += groups[0].index.scored_bytes(scored, queries, self.top_k)
        stats.attended += attended
        stats.bytes_moved += attended * self._moved_bytes(layer_idx)
        if tail is not None:
            stats.estimated += tail.attended
            if self.estimation_budget < 1:
                self._count_centroids(sum(tail.clusters))

    def _moved_bytes(self, layer_idx: int) -> int:
        """Of key and value of a token that is gathered, those that come from CPU memory."""
        return 0 if self._keys[layer_idx].is_cuda else 2 * self.head_dim * self.dtype.itemsize

    def _compare(self, queries: Tensor, found: list[Found], layer_idx: int, agreement: Agreement) -> None:
        """Adds recall and attention mass of one step for queries [B * Hkv, g, D], by an exact scan of every group's
        keys."""
        for group, result in zip(self._groups[layer_idx], found, strict=True):
            sequences = group.sequences
            keys = group.tokens(self._searched_keys(layer_idx)).flatten(0, 1).cpu()
            zone = self._zones[layer_idx]
            static_keys = zone.keys[sequences, :, : zone.counts[group.start]].flatten(0, 1).cpu()
            tables = agreement_with_exact(queries[group.rows(self.kv_head)], keys, static_keys, result.ids, self.top_k)
            each = (table.view(group.count, self.num_heads) for table in (*tables, result.keys_scored))
            agreement.add(layer_idx, *each)
