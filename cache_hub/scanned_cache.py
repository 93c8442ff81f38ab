"""Exact top-k retrieval by a scan on the GPU, over a compact copy of the keys: a decode step asks no host."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from config import ConfigError

from .flat_cache import FlatCache
from .growing_layers import inserted_at_once
from .index.device_keys import DeviceKeys
from .index.device_scan import MAX_TOP_K, DeviceScan, Union
from .layer_search import Found, HostBuffers
from .memory import Need, RunShape
from .stats import CacheStats, DeviceCountedStats

if TYPE_CHECKING:
    from attn_hub.kernels.weighted_decode import TritonSplits
    from attn_hub.reference import ReferenceSplits
    from config import RetroInferConfig

    from .cache import KV_Cache


@dataclass(frozen=True)
class Scanned:
    """What a layer's device has of its indexed tokens; see Union. None of it ever moves."""

    keys: DeviceKeys
    counts: Tensor
    steps: Tensor
    assignment: Tensor
    ring: Tensor | None


class ScannedFlatCache(FlatCache):
    """FlatCache that finds the top_k on the layer's GPU, over a copy of the keys in 8 bits there (DeviceKeys).

    Keys and values lie in pinned CPU memory as ever, or with `gpu_only` on the GPU alone, where attention gathers what
    was found. Which tokens those are never leaves the GPU: `needs_host` is False, so that a whole decode step can be
    one CUDA graph. The copy is made of the prompt's states, or of a restored store, and grows with the index; beside it
    lie each token's cluster and, where generated tokens enter the index, the queries of the latest `insert_batch`
    steps.
    """

    searches_on_host: ClassVar[bool] = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._check_use(self.estimation, self.top_k, self.devices)
        self._scanned: dict[int, Scanned] = {}
        self._scans: dict[torch.device, DeviceScan] = {}
        self._counters: list[Tensor] = []
        self._count_anew()

    @classmethod
    def chosen(cls, settings: RetroInferConfig) -> type[KV_Cache]:
        return cls

    @staticmethod
    def _check_use(estimation: str, top_k: int, devices: list[torch.device]) -> None:
        """Raises ConfigError for what a scan on the GPU does not do."""
        if estimation == "softmax_lift":
            raise ConfigError("estimation: got 'softmax_lift', allowed with flat.on_gpu: none, centroid")
        if top_k > MAX_TOP_K:
            raise ConfigError(f"top_k: got {top_k}, allowed with flat.on_gpu: 1 to {MAX_TOP_K}")
        elsewhere = sorted({str(device) for device in devices if device.type != "cuda"})
        if elsewhere:
            raise ConfigError(
                f"flat.on_gpu: got true for layers on {', '.join(elsewhere)}, allowed: true where all are on GPUs"
            )

    @classmethod
    def layer_needs(cls, settings: RetroInferConfig, shape: RunShape, device: torch.device) -> list[Need]:
        o, new = cls.options(settings), shape.max_new_length
        cls._check_use(o["estimation"], o["top_k"], [device])
        needs = super().layer_needs(settings, shape, device)
        ends, batch = o["static_pattern_start"] + o["static_pattern_end"], inserted_at_once(o["insert_batch"], new)
        if shape.longest <= ends:
            return needs
        room = room_for(shape.longest - ends, new, batch)
        rows = shape.batch * shape.kv_heads
        queries = batch * shape.batch * shape.heads * shape.head_dim * shape.dtype.itemsize
        compact = DeviceKeys.expected_bytes(rows, room, shape.head_dim) + 4 * rows * room + queries
        return [*needs, Need(device, "compact keys", compact)]

    def retune(self, settings: RetroInferConfig) -> None:
        options = self.options(settings)
        self._check_use(options["estimation"], options["top_k"], self.devices)
        if options["top_k"] != self.top_k:
            self._scans.clear()
        super().retune(settings)

    @torch.inference_mode()  # in which the steps were made, and counted
    def rewind(self) -> None:
        super().rewind()
        for state in self._scanned.values():
            state.steps.zero_()
        self._count_anew()

    def store_prompt(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, start_bdx: int) -> None:
        super().store_prompt(q, k, v, layer_idx, start_bdx)
        indexed = self.indexed_range(k.shape[1])
        if indexed:
            keys = k[:, indexed.start : indexed.stop].transpose(1, 2)
            with self.stats.timed("build"):
                self._state_of(layer_idx).keys.put(slice(start_bdx, start_bdx + len(k)), keys)

    def restore_layer(self, layer_idx: int, tensors: dict[str, Tensor], index_path: Path | None) -> None:
        super().restore_layer(layer_idx, tensors, index_path)
        for group in self._groups[layer_idx]:
            self._state_of(layer_idx).keys.put(group.sequences, group.tokens(self._keys[layer_idx]))

    def _use_tails(self) -> None:
        super()._use_tails()
        for layer_idx, tail in enumerate(self._tails):
            if layer_idx in self._scanned:
                tokens = tail.assignment.shape[2]
                self._scanned[layer_idx].assignment[..., :tokens] = tail.assignment

    def note_grown(self, layer_idx: int) -> None:
        state, batch = self._scanned[layer_idx], self.insert_batch
        for group in self._groups[layer_idx]:
            keys = group.tokens(self._keys[layer_idx])
            fresh = slice(keys.shape[2] - batch, keys.shape[2])
            state.keys.grow(group.sequences, keys[:, :, fresh].contiguous())
            if self._tails:
                clusters = self._tails[layer_idx].assignment[group.sequences, :, fresh]
                state.assignment[group.sequences, :, fresh] = clusters.to(state.assignment.device)

    def needs_host(self, layer_idx: int) -> bool:
        return False

    def begin(self, query_states: Tensor, layer_idx: int) -> ReferenceSplits | TritonSplits:
        """As TokenIndexCache.begin, and finds what the rest attends to."""
        begun = super().begin(query_states, layer_idx)
        if self._groups[layer_idx]:
            query = query_states if query_states.stride(3) == 1 else query_states.contiguous()
            self._search(query, layer_idx)
            self._scan_of(layer_idx).unite(self._scanned[layer_idx].keys, self._union_of(layer_idx), query)
            if self.stats.agreement is not None:
                with self.stats.timed("diagnosis"):
                    self._diagnose(query, layer_idx)
        return begun

    def _search(self, query: Tensor, layer_idx: int) -> None:
        self._scan_of(layer_idx).search(query, self._scanned[layer_idx].keys)

    def captured(self, layer_idx: int) -> tuple[int, ...]:
        addresses = super().captured(layer_idx)
        if not self._groups[layer_idx]:
            return addresses
        held = (
            self._scanned[layer_idx].keys.codes,
            self._scan_of(layer_idx).scores,
            self._buffers_of(layer_idx).clusters,
        )
        return (*addresses, *(tensor.data_ptr() for tensor in held), self.top_k)

    def note_step(self, layer_idx: int) -> None:
        stats = self.stats
        assert isinstance(stats, DeviceCountedStats)
        context = sum(self.context_lengths(layer_idx))
        stats.known_attended += sum(self._zones[layer_idx].counts) * self.kv_head
        stats.attended_of += context * self.kv_head
        stats.scored_of += context * self.num_heads
        if not self._groups[layer_idx]:
            return
        self._note_scored(layer_idx)
        tail = self._tail_of(layer_idx)
        if tail is not None:
            stats.estimated += tail.attended
            if self.estimation_budget < 1:
                self._count_centroids(sum(tail.clusters))
        self._note_due(layer_idx)

    def _note_scored(self, layer_idx: int) -> None:
        scored = sum(self._scanned[layer_idx].keys.counts) * self.num_heads
        self.stats.scored += scored
        self.stats.scored_bytes += scored * (self.head_dim + 4)

    def _note_due(self, layer_idx: int) -> None:
        ring, step = self._scanned[layer_idx].ring, self.generated[layer_idx]
        if ring is not None and step <= self.max_new_length and self._latest[layer_idx].due(step):
            self._due[layer_idx] = ring.roll(-(step % self.insert_batch), 0)

    def _diagnose(self, query: Tensor, layer_idx: int) -> None:
        assert self.stats.agreement is not None
        queries, found = query.float().cpu().reshape(-1, self.group_size, self.head_dim), []
        ids, scored = self._scan_of(layer_idx).found(self._scanned[layer_idx].keys)
        for group in self._groups[layer_idx]:
            own, keys = (table[group.sequences].flatten(0, 1).cpu() for table in (ids, scored))
            found.append(Found(own, keys.long()[:, None].repeat(1, own.shape[1])))
        self._compare(queries, found, layer_idx, self.stats.agreement)

    def _state_of(self, layer_idx: int) -> Scanned:
        if layer_idx not in self._scanned:
            device, rows = self.devices[layer_idx], (self.batch_size, self.kv_head)
            middle = self.max_length - self.max_new_length - self.sinks - self.window
            room = room_for(middle, self.max_new_length, self.insert_batch)
            ring = None
            if self.insert_batch:
                shape = (self.insert_batch, self.batch_size, self.num_heads, self.head_dim)
                ring = torch.zeros(shape, dtype=self.dtype, device=device)
            keys = self._empty_keys(room, device)
            counts, steps = (torch.zeros(rows, dtype=kind, device=device) for kind in (torch.int64, torch.int32))
            assignment = torch.zeros(keys.scales.shape, dtype=torch.int32, device=device)
            self._scanned[layer_idx] = Scanned(keys, counts, steps, assignment, ring)
            self._counters.append(counts)
        return self._scanned[layer_idx]

    def _scan_of(self, layer_idx: int) -> DeviceScan:
        device = self.devices[layer_idx]
        if device not in self._scans:
            self._scans[device] = self._scan_over(self._scanned[layer_idx].keys)
        return self._scans[device]

    def _empty_keys(self, room: int, device: torch.device) -> DeviceKeys:
        return DeviceKeys(self.batch_size, self.kv_head, room, self.head_dim, device)

    def _scan_over(self, keys: DeviceKeys) -> DeviceScan:
        return DeviceScan(keys, self.group_size, self.top_k)

    def _union_of(self, layer_idx: int) -> Union:
        state, buffers = self._scanned[layer_idx], self._buffers_of(layer_idx)
        assignment = state.assignment if self._tail_of(layer_idx) is not None else None
        first = self._groups[layer_idx][0].first
        places = buffers.positions, buffers.clusters
        return Union(first, *places, state.counts, state.steps, assignment, state.ring)

    def _buffers_of(self, layer_idx: int) -> HostBuffers:
        """Not the host's at all: positions and clusters lie where they are found, and the query is where it is."""
        device = self.devices[layer_idx]
        if device not in self._buffers:
            places = (self.batch_size, self.kv_head, self.group_size * self.top_k)
            positions, clusters = (torch.full(places, -1, dtype=torch.int32, device=device) for _ in range(2))
            self._buffers[device] = HostBuffers(torch.empty(0), positions, clusters, None)
        return self._buffers[device]

    def _count_anew(self) -> None:
        """Goes on with statistics of which the devices count what they find."""
        totals = {field.name: getattr(self.stats, field.name) for field in fields(CacheStats)}
        self.stats = self._stats_of(totals)

    def _stats_of(self, totals: dict[str, Any]) -> DeviceCountedStats:
        return DeviceCountedStats(self._counters, self._moved_bytes(0), **totals)

    @property
    def index_bytes(self) -> int:
        states = self._scanned.values()
        return super().index_bytes + sum(state.keys.nbytes + state.assignment.nbytes for state in states)


def room_for(middle: int, new: int, batch: int) -> int:
    """Tokens that are ever indexed, of `middle` of the prompt and `new` generated ones, `batch` at a time; 0: none."""
    return middle + (new // batch * batch if batch else 0)
