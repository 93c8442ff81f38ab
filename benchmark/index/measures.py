"""From the answers of all layers to one result row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_hub import KV_Cache

from .drive import Answers
from .reference import relative_errors
from .traces import LayerTrace

METRICS = ("recall", "mass", "output_error", "bytes")
_DIGITS = 6


@dataclass(frozen=True)
class LayerResult:
    """One layer under one configuration; errors [Hkv * g, t] float64 or None, the rest as in Answers and KV_Cache."""

    layer: int
    errors: Tensor | None
    answers: Answers
    build_seconds: float
    build_stages: dict[str, float]
    index_bytes: int
    kv_bytes: int
    item_bytes: int
    notes: list[str]


def layer_result(
    trace: LayerTrace,
    answers: Answers,
    exact: Tensor | None,
    cache: KV_Cache,
    build_seconds: float,
    build_stages: dict[str, float],
) -> LayerResult:
    errors = None if exact is None else relative_errors(answers.outputs, exact).flatten(0, 1)
    sizes = cache.index_bytes, cache.kv_bytes, cache.dtype.itemsize
    return LayerResult(trace.layer, errors, answers, build_seconds, build_stages, *sizes, list(cache.stats.notes))


def summarize(results: Sequence[LayerResult], shape: Sequence[int], metrics: Sequence[str]) -> dict[str, Any]:
    """The measured part of a row; shape is that of the tests, [Hkv, g, t, d].

    output_error: mean, median and p90 over all (layer, query head, test query); worst_head, the largest of the means
    over a head's queries, and which it is; by_head, those means, [layer][query head]. recall of the cache's own top_k
    and mass (of all tokens attended to; mass_of_exact relative to retrieving the exact top_k): means over heads, the
    worst head's, by_head; None where the cache does not keep them. keys_scored_by_head, [layer][query head], with
    recall: by the search, to whole keys. Costs: see `_costs`.
    """
    row: dict[str, Any] = {}
    layers = [result.layer for result in results]
    if "output_error" in metrics:
        errors = np.stack([result.errors.numpy() for result in results if result.errors is not None])
        row["output_error"] = {
            "mean": _rounded(errors.mean()),
            "median": _rounded(np.median(errors)),
            "p90": _rounded(np.quantile(errors, 0.9)),
            **_by_head(errors.mean(2), layers, largest=True),
        }
    answers = [result.answers for result in results]
    known = [a for a in answers if a.recall is not None]
    tables = {"recall": [a.recall for a in known], "mass": [a.mass for a in known]}
    for name, table in tables.items():
        if name in metrics:
            row[name] = _agreement(table, layers) if len(known) == len(answers) else None
    if "recall" in metrics and len(known) == len(answers):
        row["keys_scored_by_head"] = [a.scored.round().int().tolist() for a in known if a.scored is not None]
    if "mass" in metrics:
        shares = [
            a.mass / a.exact_mass.clamp(min=1e-12) for a in known if a.mass is not None and a.exact_mass is not None
        ]
        row["mass_of_exact"] = _agreement(shares, layers) if len(known) == len(answers) else None
    if "bytes" in metrics:
        row.update(_costs(results, shape))
    row["build_seconds"] = _rounded(sum(result.build_seconds for result in results))
    row["build_seconds_by_stage"] = _summed([result.build_stages for result in results])
    asked = len(results) * shape[2]
    stages = _summed([result.answers.seconds for result in results])
    row["ms_per_query_and_layer"] = {stage: _rounded(1000 * seconds / asked) for stage, seconds in stages.items()}
    row["notes"] = list(dict.fromkeys(note for result in results for note in result.notes))
    return row


def _costs(results: Sequence[LayerResult], shape: Sequence[int]) -> dict[str, Any]:
    """Means over layers and test queries; bytes at the store's type, but for scoring_bytes.

    tokens_attended: per kv head, the union over its query heads, static tokens included. rows_estimated: per kv head,
    clusters that stood for tokens not attended to. keys_scored: per query head, every inner product of the search.
    bytes_read, per kv head and query: key and value of every row attended to or estimated, of which estimate_bytes.
    scoring_bytes, per kv head and query, not in bytes_read: a key for every inner product of its query heads, as if
    none served two of them, in the type that is read for it (index_dtype; 1 byte an element and 4 of a scale in int8's
    walk, whose beam is read from the store; faiss's own float32 copy). counts: every counter of CacheStats, per query
    and layer.
    """
    kv_heads, group, queries, dim = shape
    asked = len(results) * queries
    counts = _summed([dict(result.answers.counts) for result in results])
    per_query = {name: count / asked for name, count in counts.items()}
    attended, estimated = per_query["attended"] / kv_heads, per_query.get("estimated", 0.0) / kv_heads
    scored = per_query["scored"] / (kv_heads * group)
    item = results[0].item_bytes
    return {
        "tokens_attended": _rounded(attended),
        "rows_estimated": _rounded(estimated),
        "keys_scored": _rounded(scored),
        "bytes_read": _rounded(2 * (attended + estimated) * dim * item),
        "estimate_bytes": _rounded(2 * estimated * dim * item),
        "scoring_bytes": _rounded(per_query["scored_bytes"] / kv_heads),
        "index_bytes": sum(result.index_bytes for result in results),
        "kv_bytes": sum(result.kv_bytes for result in results),
        "counts": {name: _rounded(count) for name, count in per_query.items()},
    }


def _agreement(tables: Sequence[Tensor | None], layers: Sequence[int]) -> dict[str, Any]:
    values = torch.stack([table for table in tables if table is not None]).numpy()
    return {"mean": _rounded(values.mean()), **_by_head(values, layers, largest=False)}


def _by_head(values: np.ndarray, layers: Sequence[int], largest: bool) -> dict[str, Any]:
    """values [layers, query heads]"""
    layer, head = divmod(int(values.argmax() if largest else values.argmin()), values.shape[1])
    return {
        "worst_head": _rounded(values[layer, head]),
        "worst_head_at": {"layer": layers[layer], "query_head": head},
        "by_head": [[_rounded(value) for value in heads] for heads in values],
    }


def _summed(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = defaultdict(int)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return dict(total)


def _rounded(value: float) -> float:
    return float(f"{float(value):.{_DIGITS}g}")
