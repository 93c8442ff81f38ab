"""The process whose memory benchmark.index.build_memory measures.

    python -m benchmark.index.build_process REQUEST

REQUEST is JSON: strategy, settings (a list, of one build key), shape [layers, n, kv_heads, group, head_dim], dtype (a
name of search_time.DTYPES), threads. The states come over standard input, layer after layer: queries [n, H, D], keys
and values [n, Hkv, D]. On standard output: a JSON list with an object for each of the settings.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cache_hub import STRATEGIES, KV_Cache, make_cache
from cache_hub.index import graph_index
from cache_hub.index._native import trim_memory
from cache_hub.index.stage_clock import StageClock
from config import RetroInferConfig

from .search_time import DTYPES

_WARM_UP = 1024
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_bytes(peak: bool = False) -> int:
    """This process's memory in RAM now, or the most since `forget_peak`."""
    match = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", _STATUS.read_text())
    if match is None:
        raise OSError(f"{_STATUS}: has no VmHWM and VmRSS, allowed: Linux")
    return int(match[1]) * 1024


def forget_peak() -> None:
    """Sets the peak to what is resident now (Linux, proc(5), clear_refs)."""
    _CLEAR.write_text("5")


class PeakWatch:
    """Peaks over what was resident when it was made: `peak` of all, and `stages`, the most of any layer by stage over
    what was resident when that layer began."""

    def __init__(self) -> None:
        self.peak, self.stages, self._before = 0, dict[str, int](), 0
        self._before = self.held()
        self.begin_layer()

    def held(self) -> int:
        """What is resident once freed memory has been given back to the system (glibc's malloc_trim)."""
        gc.collect()
        trim_memory()
        return resident_bytes() - self._before

    def begin_layer(self) -> None:
        self._layer_began = resident_bytes()
        forget_peak()

    def mark(self, stage: str) -> None:
        """The stage ends here."""
        most = resident_bytes(peak=True)
        self.peak = max(self.peak, most - self._before)
        self.stages[stage] = max(self.stages.get(stage, 0), most - self._layer_began)
        forget_peak()


def watched_clock(watch: PeakWatch) -> type[StageClock]:
    """A clock of build stages that marks their ends in `watch` too."""

    class WatchedClock(StageClock):
        def stage(self, name: str) -> None:
            super().stage(name)
            watch.mark(name)

    return WatchedClock


def new_cache(request: dict[str, Any], layers: int, n: int) -> KV_Cache:
    """The cache of the request's first settings, for one prompt of n tokens."""
    _, _, kv_heads, group, head_dim = request["shape"]
    return make_cache(
        request["strategy"],
        RetroInferConfig(**request["settings"][0]),
        layer_num=layers,
        batch_size=1,
        max_length=n + 1,
        max_new_length=1,
        num_key_value_heads=kv_heads,
        num_heads=kv_heads * group,
        head_dim=head_dim,
        dtype=DTYPES[request["dtype"]],
    )


def read_states(states: list[Tensor]) -> None:
    """Fills contiguous tensors from standard input, in place. Raises EOFError where it ends before."""
    with open(sys.stdin.fileno(), "rb", closefd=False, buffering=0) as pipe:
        for tensor in states:
            room = tensor.view(-1).view(torch.uint8).numpy().data
            while room:
                count = pipe.readinto(room)
                if not count:
                    raise EOFError("states: standard input ended before the last layer")
                room = room[count:]


def warm_up(request: dict[str, Any]) -> None:
    """A small build of the same kind: libraries are loaded and threads started before anything is measured."""
    _, n, kv_heads, group, head_dim = request["shape"]
    n, dtype = min(n, _WARM_UP), DTYPES[request["dtype"]]
    cache = new_cache(request, 1, n)
    q, k, v = (torch.randn(1, n, heads, head_dim).to(dtype) for heads in (kv_heads * group, kv_heads, kv_heads))
    cache.prefill_update_kv_cache(q, k, v, 0, 0)
    cache.sync(0, 0)
    cache.prepare_cache()
    for settings in request["settings"]:
        cache.retune(RetroInferConfig(**settings))


@torch.inference_mode()
def measure(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Builds layer by layer as prefill does; a row for each of the settings, see build_memory."""
    layers, n, kv_heads, group, head_dim = request["shape"]
    torch.set_num_threads(request["threads"])
    warm_up(request)
    # Written to, so that all their pages are resident before the watch begins.
    dtype = DTYPES[request["dtype"]]
    q, k, v = (torch.ones(1, n, heads, head_dim, dtype=dtype) for heads in (kv_heads * group, kv_heads, kv_heads))
    watch = PeakWatch()
    cache = new_cache(request, layers, n)
    with mock.patch.object(graph_index, "StageClock", watched_clock(watch)):
        for layer in range(layers):
            read_states([q, k, v])
            watch.begin_layer()
            cache.prefill_update_kv_cache(q, k, v, layer, 0)
            watch.mark("store")
            cache.sync(layer, 0)
            watch.mark("rest of the build")
    rows: list[dict[str, Any]] = []
    watch.begin_layer()
    cache.prepare_cache()
    for settings in request["settings"]:
        cache.retune(RetroInferConfig(**settings))
        watch.mark("clusters")
        sizes = {"kv_bytes": cache.kv_bytes, "index_bytes": cache.index_bytes}
        rows.append({**sizes, "peak_bytes": watch.peak, "stages": dict(watch.stages)})
    rows[-1]["held_bytes"] = watch.held()
    return rows


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    assert len({STRATEGIES[asked["strategy"]].build_key(RetroInferConfig(**each)) for each in asked["settings"]}) == 1
    json.dump(measure(asked), sys.stdout)
