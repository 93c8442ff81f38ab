"""Drives a strategy's own KV cache with one layer of a trace, and reads off what it returned and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, fields
from time import perf_counter

import torch
from torch import Tensor

from cache_hub import CacheStats, KV_Cache, make_cache
from config import RetroInferConfig

from .traces import LayerTrace


@dataclass(frozen=True)
class Answers:
    """What a cache gave for all test queries of a layer.

    outputs [Hkv, g, t, d] float32 on the CPU. counts: every integer counter of CacheStats, seconds: its stages, both of
    these queries alone. recall, mass, exact_mass and keys scored by the search [Hkv * g] float64, means over the
    queries; None where the cache keeps no agreement with an exact scan.
    """

    outputs: Tensor
    counts: dict[str, int]
    seconds: dict[str, float]
    recall: Tensor | None
    mass: Tensor | None
    exact_mass: Tensor | None
    scored: Tensor | None


@torch.inference_mode()
def fill(
    strategy: str, settings: RetroInferConfig, trace: LayerTrace, device: str, dtype: torch.dtype, diagnose: bool
) -> tuple[KV_Cache, float]:
    """The strategy's cache with the prompt of one layer in it, all its kv heads, and the seconds that took."""
    kv_heads, group, n, dim = trace.queries.shape
    cache = make_cache(
        strategy,
        settings,
        layer_num=1,
        batch_size=1,
        max_length=n + 1,
        max_new_length=1,
        num_key_value_heads=kv_heads,
        num_heads=kv_heads * group,
        head_dim=dim,
        dtype=dtype,
        layer_mapping={"0": device},
        diagnose=diagnose,
    )
    # [Hkv, (g,) n, d] -> [1, n, heads, d]
    q = trace.queries.flatten(0, 1).transpose(0, 1)[None].to(device, dtype)
    k, v = (states.transpose(0, 1)[None].to(device, dtype) for states in (trace.keys, trace.values))
    _synchronize(device)
    start = perf_counter()
    cache.prefill_update_kv_cache(q, k, v, 0, 0)
    cache.sync(0, 0)
    cache.prepare_cache()
    _synchronize(device)
    return cache, perf_counter() - start


@torch.inference_mode()
def go_over(cache: KV_Cache, settings: RetroInferConfig) -> None:
    """To settings that the filled cache can serve; its seconds are then those of building what they need."""
    cache.rewind()
    cache.retune(settings)


@torch.inference_mode()
def ask(cache: KV_Cache, trace: LayerTrace) -> Answers:
    """Asks every test query in order; no token is added between them, so that all see the prompt and nothing else."""
    stats = cache.stats
    before, stages, sums = _counts(stats), dict(stats.seconds), _agreement(stats)
    # [Hkv, g, t, d] -> [t, 1, 1, Hkv * g, d]
    queries = trace.tests.flatten(0, 1).transpose(0, 1)[:, None, None].to(cache.devices[0], cache.dtype)
    outputs = torch.stack([cache.compute(query, 0)[0, 0].float().cpu() for query in queries])
    counts = {name: count - before[name] for name, count in _counts(stats).items()}
    seconds = {stage: spent - stages.get(stage, 0.0) for stage, spent in stats.seconds.items()}
    means: list[Tensor | None] = [None] * 4
    if sums is not None and (now := _agreement(stats)) is not None and (steps := now[1] - sums[1]) > 0:
        means = [(table - earlier) / steps for table, earlier in zip(now[0], sums[0], strict=True)]
    shaped = outputs.transpose(0, 1).reshape(trace.tests.shape)
    return Answers(shaped, counts, {stage: spent for stage, spent in seconds.items() if spent > 0}, *means)


def _counts(stats: CacheStats) -> dict[str, int]:
    """Whatever a strategy counts, so that its own counters need no change here."""
    values = {field.name: getattr(stats, field.name) for field in fields(stats)}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def _agreement(stats: CacheStats) -> tuple[list[Tensor], int] | None:
    """Copies of the sums of recall, mass, exact mass and keys scored, [heads], and the steps they are of."""
    if stats.agreement is None:
        return None
    sums = stats.agreement
    tables = (sums.recall, sums.mass, sums.exact_mass, sums.scored)
    return [table[0].clone() for table in tables], int(sums.steps[0])


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
