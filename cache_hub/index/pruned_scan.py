"""The best keys of each query head by a scan on the device of the clusters whose centroids it scores best."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .clustered_keys import ClusteredKeys
from .device_keys import DeviceKeys
from .device_scan import MAXIMA, DeviceScan, ScanTuning, Union
from .prune_kernels import bound_kernel, rank_clusters_kernel, scan_chosen_kernel

# Clusters of which one program of scan_chosen_kernel scans the chosen ones.
SPLIT = 128
# Clusters that one program of bound_kernel holds without spilling; where there are more, it sees an even sample.
_SAMPLE = 1 << 14
_RANKED_AT_ONCE = 64
_TUNING = ScanTuning()


class PrunedScan(DeviceScan):
    """As DeviceScan, over ClusteredKeys: each query head asks for so many clusters (`wanted`), the best by the inner
    product with their centroids, and the keys of all clusters that any head of its group has chosen are scored for all
    of them. An inverted file whose lists are the clusters.

    Keys that are scored get slots, in the order in which they lie; ids are slots until `unite` or `found`. places
    [B * Hkv, slots] int32: the key in each slot.
    """

    def __init__(self, keys: ClusteredKeys, group: int, k: int, tuning: ScanTuning = _TUNING) -> None:
        self._splits = triton.cdiv(keys.starts.shape[2] - 1, SPLIT)
        super().__init__(keys, group, k, tuning)
        device, rows, clusters = keys.codes.device, keys.lengths.numel(), keys.starts.shape[2] - 1
        self.ranks = torch.empty(rows * group, clusters, device=device)
        self.bounds = torch.empty(rows * group, dtype=torch.int32, device=device)
        self.places = torch.empty(rows, self.scores.shape[1], dtype=torch.int32, device=device)
        self.counts = torch.zeros(*keys.lengths.shape, self._splits, dtype=torch.int32, device=device)
        self._ends = torch.zeros_like(keys.lengths)

    @staticmethod
    def counters(keys: ClusteredKeys) -> Tensor:
        """Zeros for `scanned` of a layer's searches."""
        shape = (*keys.lengths.shape, triton.cdiv(keys.starts.shape[2] - 1, SPLIT))
        return torch.zeros(shape, dtype=torch.int64, device=keys.codes.device)

    def _layout(self, keys: DeviceKeys) -> tuple[int, int]:
        # The slots of a split begin with a run, which leaves some of every run of slots unused.
        run = self.tuning.run
        while triton.cdiv(keys.codes.shape[2], run) + self._splits > MAXIMA and run < self.tuning.keys:
            run *= 2
        return keys.codes.shape[2] + self._splits * run, run

    def search_clusters(self, query: Tensor, keys: ClusteredKeys, centroids: Tensor, scanned: Tensor) -> Tensor:
        """ids [B, Hkv, g, k] of each head's k best keys, ascending, -1 behind them, of equal scores the lowest; slots,
        of the keys that were scanned. query as for `search`.

        centroids [B, Hkv, C', D] of any float type, contiguous, as many as there are clusters at least. scanned: of
        `counters`, grows by the keys scored.
        """
        batch, kv_heads, room, dim = keys.codes.shape
        tuning, rows, clusters = self.tuning, batch * kv_heads, keys.starts.shape[2] - 1
        strides = query.stride(0), query.stride(2)
        every = triton.cdiv(clusters, _SAMPLE)
        sample = max(triton.next_power_of_2(triton.cdiv(clusters, every)), 16)
        with torch.cuda.device_of(query):
            rank_clusters_kernel[(rows, triton.cdiv(clusters, _RANKED_AT_ONCE))](
                query, centroids, keys.starts, self.ranks, clusters, centroids.shape[2], kv_heads, *strides,
                DIM=dim, GROUP=self._group, BLOCK_G=max(triton.next_power_of_2(self._group), 16),
                BLOCK_C=_RANKED_AT_ONCE, BLOCK_D=max(triton.next_power_of_2(dim), 16),
                COMPUTE=_compute(query, centroids), num_warps=4,
            )  # fmt: skip
            bound_kernel[(rows * self._group,)](
                self.ranks, keys.wanted, self.bounds, clusters,
                GROUP=self._group, EVERY=every, BLOCK=sample, num_warps=16 if sample > 1 << 12 else 4,
            )  # fmt: skip
            scan_chosen_kernel[(rows, self._splits)](
                query, keys.codes, keys.scales, keys.starts, self.ranks, self.bounds, self.places, self.scores,
                self._maxima, self._ends, self.counts, scanned, clusters, room, self.scores.shape[1], self._splits,
                kv_heads, *strides,
                DIM=dim, GROUP=self._group, BLOCK_G=max(triton.next_power_of_2(self._group), 8), BLOCK_C=SPLIT,
                BLOCK_N=tuning.keys, BLOCK_D=max(triton.next_power_of_2(dim), 32), RUN=self._run, STAGES=tuning.stages,
                num_warps=tuning.warps,
            )  # fmt: skip
        self.select(self._ends)
        return self.ids

    def found(self, keys: DeviceKeys) -> tuple[Tensor, Tensor]:
        """See DeviceScan."""
        assert isinstance(keys, ClusteredKeys)
        slots, there = self.ids.clamp(min=0).long().flatten(2), self.ids.flatten(2) >= 0
        places = self.places.view(*keys.lengths.shape, -1).gather(2, slots).long().masked_fill(~there, 0)
        tokens = keys.tokens.gather(2, places).masked_fill(~there, -1)
        return tokens.view_as(self.ids), self.counts.sum(2)

    def unite(self, keys: DeviceKeys, union: Union, query: Tensor) -> None:
        """See DeviceScan."""
        assert isinstance(keys, ClusteredKeys)
        self._unite(keys, union, query, self.places, keys.tokens)


def _compute(query: Tensor, centroids: Tensor) -> tl.dtype:
    """What products are taken of: 16 bits where query and centroids are that, which Triton's interpreter cannot."""
    same = query.is_cuda and query.dtype == centroids.dtype
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(query.dtype, tl.float32) if same else tl.float32
