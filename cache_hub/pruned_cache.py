"""Top-k retrieval by a scan on the GPU of those clusters alone that the queries choose by their centroids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from config import ConfigError

from .growing_layers import inserted_at_once
from .index.clustered_keys import ClusteredKeys
from .index.device_keys import DeviceKeys
from .index.device_scan import DeviceScan
from .index.pruned_scan import PrunedScan
from .memory import Need, RunShape
from .scanned_cache import Scanned, ScannedFlatCache, room_for
from .stats import DeviceCountedStats, ScanCountedStats
from .tail import CentroidTail

if TYPE_CHECKING:
    from config import RetroInferConfig


class PrunedFlatCache(ScannedFlatCache):
    """ScannedFlatCache that scans, of the clusters that stand for what is not retrieved (CentroidTail), the share that
    scores best: each query head chooses `scan_share` of them by their centroids, and at least top_k, since the best
    top_k keys may lie in as many; the keys of all that a kv head's query heads have chosen are scored for all of them.

    The keys in 8 bits lie cluster by cluster. Generated tokens that enter the index form clusters of their own behind
    the others, as in the tail, and are found like these.
    """

    def __init__(self, *, scan_share: float, **options: Any) -> None:
        self.scan_share = scan_share
        self._keys_scanned: dict[int, Tensor] = {}
        self._scan_counters: list[Tensor] = []
        super().__init__(**options)

    @classmethod
    def options(cls, settings: RetroInferConfig) -> dict[str, Any]:
        return super().options(settings) | {"scan_share": settings.flat.scan_share}

    @staticmethod
    def _check_use(estimation: str, top_k: int, devices: list[torch.device]) -> None:
        """Raises ConfigError for what a scan of clusters on the GPU does not do."""
        ScannedFlatCache._check_use(estimation, top_k, devices)
        if estimation != "centroid":
            raise ConfigError(f"estimation: got {estimation!r}, allowed with flat.scan_share below 1: centroid")

    @classmethod
    def layer_needs(cls, settings: RetroInferConfig, shape: RunShape, device: torch.device) -> list[Need]:
        needs, o, new = super().layer_needs(settings, shape, device), cls.options(settings), shape.max_new_length
        middle = shape.longest - o["static_pattern_start"] - o["static_pattern_end"]
        batch = inserted_at_once(o["insert_batch"], new)
        if middle <= 0:
            return needs
        clusters = CentroidTail.most_clusters(middle, new, batch)
        order = ClusteredKeys.order_bytes(shape.batch * shape.kv_heads, room_for(middle, new, batch), clusters)
        return [*needs, Need(device, "order of the compact keys", order)]

    def _use_tails(self) -> None:
        super()._use_tails()
        for layer_idx, state in self._scanned.items():
            keys, tail = self._clustered_keys(layer_idx), self._tails[layer_idx]
            with self.stats.timed("build"):
                for group in self._groups[layer_idx]:
                    if not keys.clustered[group.start]:
                        assignment = state.assignment[group.sequences, :, : group.stop - group.first]
                        keys.arrange(group.sequences, assignment, tail.clusters[group.start])
            keys.want(self.scan_share, self.top_k)

    def note_grown(self, layer_idx: int) -> None:
        super().note_grown(layer_idx)
        keys, tail = self._clustered_keys(layer_idx), self._tails[layer_idx]
        for group in self._groups[layer_idx]:
            total = group.stop - group.first
            fresh = self._scanned[layer_idx].assignment[group.sequences, :, total - self.insert_batch : total]
            keys.arrange(group.sequences, fresh, tail.clusters[group.start])
        keys.want(self.scan_share, self.top_k)

    def _search(self, query: Tensor, layer_idx: int) -> None:
        scan, keys = self._scan_of(layer_idx), self._clustered_keys(layer_idx)
        assert isinstance(scan, PrunedScan)
        scan.search_clusters(query, keys, self._tails[layer_idx].centroids, self._keys_scanned[layer_idx])

    def _note_scored(self, layer_idx: int) -> None:
        """What the devices do not count: the centroids."""
        self._count_centroids(sum(self._tails[layer_idx].clusters))

    def _count_centroids(self, scored: int) -> None:
        stats = self.stats
        assert isinstance(stats, ScanCountedStats)
        stats.known_scored += self.num_heads * scored
        stats.known_scored_bytes += self.num_heads * scored * self.head_dim * self.dtype.itemsize

    def _stats_of(self, totals: dict[str, Any]) -> DeviceCountedStats:
        counted = self._counters, self._moved_bytes(0)
        return ScanCountedStats(self._scan_counters, self.group_size, self.head_dim + 4, *counted, **totals)

    def _state_of(self, layer_idx: int) -> Scanned:
        state = super()._state_of(layer_idx)
        if layer_idx not in self._keys_scanned:
            self._keys_scanned[layer_idx] = PrunedScan.counters(self._clustered_keys(layer_idx))
            self._scan_counters.append(self._keys_scanned[layer_idx])
        return state

    def _clustered_keys(self, layer_idx: int) -> ClusteredKeys:
        keys = self._scanned[layer_idx].keys
        assert isinstance(keys, ClusteredKeys)
        return keys

    def _empty_keys(self, room: int, device: torch.device) -> DeviceKeys:
        middle = self.max_length - self.max_new_length - self.sinks - self.window
        clusters = CentroidTail.most_clusters(middle, self.max_new_length, self.insert_batch)
        return ClusteredKeys(self.batch_size, self.kv_head, room, self.head_dim, clusters, device)

    def _scan_over(self, keys: DeviceKeys) -> DeviceScan:
        assert isinstance(keys, ClusteredKeys)
        return PrunedScan(keys, self.group_size, self.top_k)
