"""Bandwidth of plain copies, what the times of a run are held against."""

from __future__ import annotations

import statistics
from time import perf_counter

import torch

_BYTES, _CPU_BYTES = 1 << 30, 1 << 28
_COPIES, _ROUNDS = 8, 5


def copy_bandwidths(device: str) -> dict[str, float]:
    """GB/s (1e9 bytes) of copies of 1 GiB, 256 MiB on a CPU, medians: "device", bytes read and written within the
    device's memory, and beside a GPU "host", bytes that come from pinned host memory."""
    if torch.device(device).type == "cpu":
        return {"device": 2 * _rate("cpu", "cpu", _CPU_BYTES)}
    return {"device": 2 * _rate(device, device, _BYTES), "host": _rate("cpu", device, _BYTES)}


def _rate(source: str, target: str, size: int) -> float:
    gpu = torch.device(target).type == "cuda"
    origin = torch.ones(size, dtype=torch.uint8, device=source, pin_memory=gpu and source == "cpu")
    copy = torch.ones(size, dtype=torch.uint8, device=target)
    seconds = []
    for _ in range(_ROUNDS):
        synchronize(target)
        begin = perf_counter()
        for _ in range(_COPIES):
            copy.copy_(origin, non_blocking=True)
        synchronize(target)
        seconds.append((perf_counter() - begin) / _COPIES)
    return size / statistics.median(seconds) / 1e9


def synchronize(device: str) -> None:
    """Waits for a GPU; a CPU has nothing to wait for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
