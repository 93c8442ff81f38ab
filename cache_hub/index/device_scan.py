"""The best keys of each query head by a scan on the device over keys in 8 bits, without the host's help."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .device_keys import DeviceKeys
from .scan_kernels import scan_kernel, select_kernel, unite_kernel

MAX_TOP_K = 1024
# Maxima that one program of select_kernel holds without spilling; where there would be more, runs are longer.
MAXIMA = 1 << 13


@dataclass(frozen=True)
class ScanTuning:
    """Of scan_kernel: keys of a tile, and how it is run. programs: a multiprocessor's; run: keys of a run at least."""

    keys: int = 128
    warps: int = 4
    stages: int = 3
    programs: int = 4
    run: int = 32


class DeviceScan:
    """Scans of one device's layers, one after the other, for caches of B sequences and Hkv kv heads of `group` query
    heads, whose DeviceKeys have all the same room N.

    ids [B, Hkv, g, k] int32: of the last search. Every call is a launch of fixed shapes that reads how many keys there
    are on the device, so that it can be captured in CUDA graphs. k: at most MAX_TOP_K.
    """

    def __init__(self, keys: DeviceKeys, group: int, k: int, tuning: ScanTuning = ScanTuning()) -> None:
        batch, kv_heads = keys.codes.shape[:2]
        device, heads = keys.codes.device, batch * kv_heads * group
        if not 1 <= k <= MAX_TOP_K:
            raise ValueError(f"top_k: got {k}, allowed: 1 to {MAX_TOP_K} for a scan on the GPU")
        self.k, self.tuning, self._group = k, tuning, group
        room, self._run = self._layout(keys)
        self._width = max(triton.next_power_of_2(k), 16)
        self.scores = torch.empty(heads, room, device=device)
        self._maxima = torch.empty(heads, room // self._run, device=device)
        self._runs = torch.empty(heads, self._width, dtype=torch.int32, device=device)
        self.ids = torch.full((batch, kv_heads, group, k), -1, dtype=torch.int32, device=device)

    def _layout(self, keys: DeviceKeys) -> tuple[int, int]:
        """Scores of a query head that there is room for, and how many of them make a run."""
        room = keys.codes.shape[2]
        return room, min(max(self.tuning.run, triton.next_power_of_2(room // MAXIMA)), self.tuning.keys)

    def search(self, query: Tensor, keys: DeviceKeys) -> Tensor:
        """ids, of each head's k best, ascending, -1 behind them; of equal scores the lowest. query [B, 1, H, D] with
        contiguous heads, of any float type; exact but for the keys' 8 bits and the query's 16."""
        self.score(query, keys)
        self.select(keys.lengths)
        return self.ids

    def found(self, keys: DeviceKeys) -> tuple[Tensor, Tensor]:
        """Of the last search: ids as tokens' numbers, and how many keys each kv head scored, [B, Hkv] integers."""
        return self.ids, keys.lengths

    def score(self, query: Tensor, keys: DeviceKeys) -> None:
        """Writes scores [B * H, N] and the maxima of their runs."""
        batch, kv_heads, room, dim = keys.codes.shape
        tuning, rows = self.tuning, batch * kv_heads
        splits = min(triton.cdiv(tuning.programs * _multiprocessors(query.device), rows), room // tuning.keys)
        with torch.cuda.device_of(query):
            scan_kernel[(rows, splits)](
                query, keys.codes, keys.scales, keys.lengths, self.scores, self._maxima, room, splits, kv_heads,
                query.stride(0), query.stride(2),
                DIM=dim, GROUP=self._group, BLOCK_G=max(triton.next_power_of_2(self._group), 8), BLOCK_N=tuning.keys,
                BLOCK_D=max(triton.next_power_of_2(dim), 32), RUN=self._run, STAGES=tuning.stages,
                num_warps=tuning.warps,
            )  # fmt: skip

    def select(self, lengths: Tensor) -> None:
        """Writes ids from what was scored, of which lengths [B, Hkv] int32 are there."""
        room = self.scores.shape[1]
        block = triton.next_power_of_2(room // self._run)
        with torch.cuda.device_of(self.scores):
            select_kernel[(len(self.scores),)](
                self.scores, self._maxima, lengths, self._runs, self.ids, room, self.k,
                GROUP=self._group, RUN=self._run, BLOCK_R=block, WIDTH=self._width,
                num_warps=8 if max(2 * block, self._width * self._run) <= 1 << 13 else 16,
            )  # fmt: skip

    def unite(self, keys: DeviceKeys, union: Union, query: Tensor) -> None:
        """Writes the union of what each kv head's query heads found last, asked by query [B, 1, H, D]."""
        self._unite(keys, union, query, None, None)

    def _unite(
        self, keys: DeviceKeys, union: Union, query: Tensor, places: Tensor | None, tokens: Tensor | None
    ) -> None:
        batch, kv_heads, room, dim = keys.codes.shape
        ring = union.ring
        with torch.cuda.device_of(query):
            unite_kernel[(batch * kv_heads,)](
                self.ids, places, tokens, union.assignment, union.positions, union.clusters, union.counts,
                query, ring, union.steps, self.scores.shape[1], room, 0 if ring is None else len(ring),
                union.first, self.k, kv_heads, query.stride(0), query.stride(2),
                DIM=dim, GROUP=self._group, BLOCK_G=triton.next_power_of_2(self._group),
                BLOCK_D=triton.next_power_of_2(dim), LOG_K=(self.k - 1).bit_length(), num_warps=4,
            )  # fmt: skip


@dataclass(frozen=True)
class Union:
    """Where `DeviceScan.unite` writes for a layer, and what from; all on its device.

    positions [B, Hkv, g * k] int32: `first` + id of each key found, once for a kv head, -1 elsewhere; clusters
    likewise, by assignment [B, Hkv, N] int32, if there is one. counts [B, Hkv] int64: grows by the keys found. ring
    [S, B, H, D], if there is one: the queries of the last S calls, call n at n % S; steps [B, Hkv] int32: calls so far.
    """

    first: int
    positions: Tensor
    clusters: Tensor
    counts: Tensor
    steps: Tensor
    assignment: Tensor | None
    ring: Tensor | None


def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 for Triton's interpreter, so that small tests have several splits, and not too many."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
