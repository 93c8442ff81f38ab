"""Seconds of a build by stage."""

from __future__ import annotations

import time

import torch


class StageClock:
    """Writes the seconds since the stage before into a dict; of a GPU, what its current stream took."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds, self._device = seconds, device
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        now = time.perf_counter()
        self._seconds[name] = now - self._last
        self._last = now
