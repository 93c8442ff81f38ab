"""Fills a strategy's cache with extended traces, and times and compares its decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from cache_hub import CacheStats, KV_Cache, make_cache
from cache_hub.stats import Agreement
from config import RetroInferConfig

from ..results import write_text
from .bandwidth import synchronize
from .dense import DenseModel, StepStates
from .extended import ExtendedTraces, States

PROFILED = 4


@dataclass(frozen=True)
class Prompts:
    """What a cache is filled with and where: `layers` of the shape, `batch` prompts of `length` tokens, prefilled
    `together` at a time. States are made once and kept in CPU memory."""

    extended: ExtendedTraces
    layers: Sequence[int]
    batch: int
    length: int
    together: int
    device: str
    dtype: torch.dtype
    _made: dict[tuple[int, int], States] = field(default_factory=dict)

    def states(self, layer: int, sequence: int) -> States:
        """See ExtendedTraces.states."""
        if (layer, sequence) not in self._made:
            self._made[layer, sequence] = self.extended.states(layer, sequence, self.length, self.dtype)
        return self._made[layer, sequence]


@dataclass(frozen=True)
class Played:
    """seconds of every step, all layers; stages: of all steps together; counts: every integer of CacheStats."""

    seconds: list[float]
    stages: dict[str, float]
    counts: dict[str, int]


@torch.inference_mode()
def fill(strategy: str, settings: RetroInferConfig, prompts: Prompts, room: int) -> tuple[KV_Cache, StepStates, float]:
    """A cache with the prompts in it and room for `room` more tokens, the steps behind them, and the seconds that
    storing and building took."""
    shape, device = prompts.extended.shape, prompts.device
    cache = make_cache(
        strategy,
        settings,
        layer_num=len(prompts.layers),
        batch_size=prompts.batch,
        max_length=prompts.length + room,
        max_new_length=room,
        num_key_value_heads=shape.kv_heads,
        num_heads=shape.heads,
        head_dim=shape.head_dim,
        dtype=prompts.dtype,
        layer_mapping={str(at): device for at in range(len(prompts.layers))},
        prefill_bsz=prompts.together,
    )
    cache.use_cuda_graph = settings.use_cuda_graph
    seconds = 0.0
    behind: list[list[list[Tensor]]] = [[], [], []]  # queries, keys, values: of every layer, of every sequence
    for at, layer in enumerate(prompts.layers):
        for kept in behind:
            kept.append([])
        for start in range(0, prompts.batch, prompts.together):
            sequences = range(start, min(start + prompts.together, prompts.batch))
            made = [prompts.states(layer, sequence) for sequence in sequences]
            q, k, v = (
                torch.stack([getattr(one, name) for one in made]).to(device) for name in ("queries", "keys", "values")
            )
            for name, kept in zip(("step_queries", "step_keys", "step_values"), behind, strict=True):
                kept[-1] += [getattr(one, name).to(device) for one in made]
            del made
            synchronize(device)
            begin = perf_counter()
            cache.prefill_update_kv_cache(q, k, v, at, start)
            cache.sync(at, start)
            synchronize(device)
            seconds += perf_counter() - begin
            del q, k, v
    begin = perf_counter()
    cache.prepare_cache()
    synchronize(device)
    seconds += perf_counter() - begin
    # [T, heads, D] of every layer and sequence -> [T, layers, B, 1, heads, D]
    q, k, v = (torch.stack([torch.stack(layer, 1) for layer in kept], 1)[:, :, :, None] for kept in behind)
    return cache, StepStates(q, k, v, _predicted(prompts)), seconds


def _predicted(prompts: Prompts) -> Tensor | None:
    """StepStates.predicted, where all sequences have them in all layers but the first."""
    layers = []
    for layer in prompts.layers[1:]:
        made = [prompts.states(layer, sequence).step_predicted for sequence in range(prompts.batch)]
        known = [one for one in made if one is not None]
        if len(known) < len(made):
            return None
        layers.append(torch.stack(known, 1))
    if not layers:
        return None
    return torch.stack([torch.zeros_like(layers[0]), *layers], 1)[:, :, :, None].to(prompts.device)


@torch.inference_mode()
def play(cache: KV_Cache, steps: StepStates, which: range, device: str, dense: DenseModel | None = None) -> Played:
    """Decodes some steps, layer after layer, waiting for the device behind each step; with `dense` as a model does it,
    the output projection included, whose states are not what the attention gets: that is the traces'."""
    before, stages, seconds = _counts(cache.stats), dict(cache.stats.seconds), []
    for step in which:
        if dense is not None:
            dense.show(steps, step)
        synchronize(device)
        begin = perf_counter()
        if dense is not None:
            dense.llm.decode_step(dense.tokens, cache)
        else:
            for layer in range(cache.layer_num):
                cache.decode_update_kv_cache(steps.keys[step, layer], steps.values[step, layer], layer)
                cache.compute(steps.queries[step, layer], layer)
        synchronize(device)
        seconds.append(perf_counter() - begin)
    spent = {name: now - stages.get(name, 0.0) for name, now in cache.stats.seconds.items()}
    counts = {name: count - before[name] for name, count in _counts(cache.stats).items()}
    return Played(seconds, {name: took for name, took in spent.items() if took > 0}, counts)


def profile(
    path: Path, cache: KV_Cache, steps: StepStates, which: range, device: str, dense: DenseModel | None
) -> None:
    """Decodes some steps under torch.profiler: path.json, a trace that browsers show, and path.txt, a table of what the
    device and the host spent where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as found:
        play(cache, steps, which, device, dense)
    found.export_chrome_trace(str(path.with_suffix(".json")))
    by = "self_cuda_time_total" if torch.device(device).type == "cuda" else "self_cpu_time_total"
    write_text(path.with_suffix(".txt"), found.key_averages().table(sort_by=by, row_limit=60))


@torch.inference_mode()
def compare(
    cache: KV_Cache, steps: StepStates, which: range, device: str, dense: DenseModel | None
) -> dict[str, float]:
    """Steps against the exact scan, untimed: recall, of the mean and of the worst query head, and the attention mass
    relative to the exact top k's; nothing where the cache retrieves nothing."""
    stats = cache.stats
    stats.agreement = Agreement.zeros(cache.layer_num, cache.num_heads)
    play(cache, steps, which, device, dense)
    found, stats.agreement = stats.agreement, None
    if not found.steps.any():
        return {}
    recall, mass, exact = (found.mean(table) for table in (found.recall, found.mass, found.exact_mass))
    of_exact = mass / exact.clamp(min=1e-9)
    return {
        "recall": recall.mean().item(),
        "recall_worst_head": recall.min().item(),
        "mass_of_exact": of_exact.mean().item(),
    }


def _counts(stats: CacheStats) -> dict[str, int]:
    values = {one.name: getattr(stats, one.name) for one in fields(stats)}
    return {name: value for name, value in values.items() if isinstance(value, int)}
