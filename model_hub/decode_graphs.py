"""Decode steps replayed as CUDA graphs, with a stop at the host where a layer's attention asks for one."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_hub import KV_Cache
from cache_hub.staged import StagedCache

if TYPE_CHECKING:
    from model_hub.llm import LLM


@dataclass(frozen=True)
class _Replay:
    """Device work, and what the host does behind its launch, in this order: it records an event, if `asks`; lets the
    search of the layer `expects` begin; and retrieves for the layer `answers`. foreseen: whether what that layer's
    query is about was posted before."""

    graph: torch.cuda.CUDAGraph
    device: torch.device
    asks: bool = False
    expects: int | None = None
    answers: int | None = None
    foreseen: bool = False


@dataclass(frozen=True)
class _Move:
    """States that go to the next layer's device."""

    source: Tensor
    target: Tensor


class DecodeGraphs:
    """The decode step of one LLM and one cache: one graph where no layer asks the host.

    A layer that asks the host posts its query, attends to what does not depend on the answer, and posts what the next
    layer will ask about. Meanwhile the host retrieves. What attends to its answer is a graph of its own and small: a
    large one takes long to launch, and the next layer's other work, which goes on from there, is launched while it
    runs; the search for what is foreseen of that layer has begun before. Where the host cannot see the query come, it
    is posted by a graph of its own, behind which an event is recorded. Captured when first called, and anew where the
    cache's buffers have moved; the kernels must have run before. Both are referred to weakly: the cache owns this.
    """

    def __init__(self, llm: LLM, cache: StagedCache) -> None:
        self.of = weakref.ref(llm)
        self._llm, self._cache = weakref.proxy(llm), weakref.proxy(cache)
        self._tokens = torch.zeros(cache.batch_size, dtype=torch.int64, device=llm.device)
        self._positions = torch.zeros(cache.batch_size, dtype=torch.int64, device=llm.device)
        self._events = {layer.device: torch.cuda.Event() for layer in llm.layers}
        self._acts: list[_Replay | _Move] = []
        self._logits = torch.empty(0)
        self._captured: tuple[int, list[tuple[int, ...]]] = (-1, [])

    def step(self, tokens: Tensor) -> Tensor:
        """As LLM.decode_step."""
        cache, layers = self._cache, range(len(self._llm.layers))
        for layer in layers:
            cache.make_room(layer)
        self._see_to_graphs()
        self._tokens.copy_(tokens)
        self._positions.copy_(torch.tensor(cache.context_lengths(0)))
        for layer in layers:
            cache.count_token(layer)
        arrived: torch.cuda.Event | None = None
        for act in self._acts:
            if isinstance(act, _Move):
                act.target.copy_(act.source)
                continue
            with torch.cuda.device(act.device):
                act.graph.replay()
                if act.asks:
                    arrived = self._events[act.device]
                    arrived.record()
            if act.expects is not None:
                cache.expect_query(act.expects)
            if act.answers is not None:
                cache.retrieve(act.answers, arrived, act.foreseen)
                arrived = None
        for layer in layers:
            cache.note_step(layer)
            cache.turn(layer)
        return self._logits.clone()

    def _see_to_graphs(self) -> None:
        version, captured = self._captured
        if version == self._cache.version:
            return
        now = [self._cache.captured(layer) for layer in range(len(self._llm.layers))]
        if now != captured:
            self._acts.clear()
            tape = _Tape(self._acts, self._llm.device)
            try:
                self._capture(tape)
            finally:
                tape.end()
        self._captured = self._cache.version, now

    def _capture(self, tape: _Tape) -> None:
        llm, cache = self._llm, self._cache
        hidden = F.embedding(self._tokens[:, None], llm.embedding)
        cos, sin = llm.cos_sin(self._positions[:, None])
        foreseen = False
        for index, layer in enumerate(llm.layers):
            hidden, cos, sin = tape.move_to(layer.device, hidden, cos, sin)
            query, key, value = layer.project(hidden, cos, sin)
            cache.write_token(key, value, index)
            asks = cache.needs_host(index)
            if asks:
                cache.post_query(query, index)
                if not cache.waits_for_query(index):
                    tape.cut(asks=True)
            begun = cache.begin(query, index)
            told, foreseen = foreseen, llm.foresee(cache, index, hidden, cos, sin)
            if asks:
                tape.cut(answers=index, foreseen=told)
            attended = cache.end(begun, index)
            if asks:
                tape.cut(expects=index + 1 if foreseen else None)
            hidden = layer.finish(hidden, attended, llm.mlp_chunk)
        self._logits = llm.project_out(hidden[:, -1])


class _Tape:
    """Captures what is called, from its making to `end`, in one graph after another, which share memory: they are
    replayed in the order of their capture."""

    def __init__(self, acts: list[_Replay | _Move], device: torch.device) -> None:
        self._acts = acts
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pools: dict[torch.device, Any] = {}
        # What is freed during a capture, such as pinned memory, may have to wait for the device, which would end it.
        self._collects = gc.isenabled()
        gc.disable()
        self._open(device)

    def _open(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
            self._pools[device] = torch.cuda.graph_pool_handle()
        self._context = torch.cuda.stream(self._streams[device])
        self._context.__enter__()
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(self._pools[device], capture_error_mode="thread_local")

    def _close(self, **then: Any) -> None:
        try:
            self._graph.capture_end()
        finally:
            self._context.__exit__(None, None, None)
        self._acts.append(_Replay(self._graph, self._device, **then))

    def cut(self, **then: Any) -> None:
        """Ends a graph, behind which the host does what _Replay names, and begins the next."""
        self._close(**then)
        self._open(self._device)

    def move_to(self, device: torch.device, *states: Tensor) -> list[Tensor]:
        """The states where the next layer computes."""
        if device == self._device:
            return list(states)
        self._close()
        moved = [one.new_empty(one.shape, device=device) for one in states]
        self._acts += [_Move(source, target) for source, target in zip(states, moved, strict=True)]
        self._open(device)
        return moved

    def end(self) -> None:
        """Ends the last graph."""
        self._close()
        if self._collects:
            gc.enable()


def graphs_of(llm: LLM, cache: KV_Cache) -> DecodeGraphs | None:
    """Those of the cache, made where they are wanted and possible; None for a step that is done without them: the first
    behind a prefill, in which the kernels are compiled, one that is compared with an exact scan, and on a CPU."""
    if not cache.use_cuda_graph or not isinstance(cache, StagedCache) or cache.stats.agreement is not None:
        return None
    if any(layer.device.type != "cuda" for layer in llm.layers) or cache.generated[0] == 0:
        return None
    if not isinstance(cache.graphs, DecodeGraphs) or cache.graphs.of() is not llm:
        cache.graphs = DecodeGraphs(llm, cache)
    return cache.graphs
