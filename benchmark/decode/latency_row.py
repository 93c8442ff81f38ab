"""What a row of benchmark.decode.latency says, out of the steps that were played, and its line in a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cache_hub import KV_Cache

from .dense import DenseModel
from .steps import Played, Prompts


def costs(
    cache: KV_Cache, prompts: Prompts, played: Played, bandwidths: Mapping[str, float], model: DenseModel | None
) -> dict[str, Any]:
    """Milliseconds, counts and bytes of a layer and step, the whole batch in it; where a model played it, what is dense
    in a layer too, and all that a step does beside its layers but the output projection. The roofline is of keys,
    values and clusters alone.

    tokens_attended and clusters_estimated are of a kv head of a sequence, keys_scored of a query head.
    """
    shape, layers = prompts.extended.shape, len(prompts.layers)
    each = layers * len(played.seconds)
    row_bytes = 2 * shape.head_dim * prompts.dtype.itemsize
    counts = played.counts
    host = counts["bytes_moved"] / each if "host" in bandwidths else 0.0
    device = (counts["attended"] + counts["estimated"]) * row_bytes / each - host
    roofline = device / bandwidths["device"] + (host / bandwidths["host"] if host else 0.0)
    head = 0.0 if model is None else model.head_ms
    of_layer = [(seconds * 1e3 - head) / layers for seconds in played.seconds]
    return {
        "ms_per_layer": statistics.median(of_layer),
        "ms_per_layer_mean": statistics.fmean(of_layer),
        "ms_per_layer_slowest": max(of_layer),
        "stage_ms_per_layer": {stage: seconds / each * 1e3 for stage, seconds in played.stages.items()},
        "tokens_attended": counts["attended"] / each / prompts.batch / shape.kv_heads,
        "clusters_estimated": counts["estimated"] / each / prompts.batch / shape.kv_heads,
        "keys_scored": counts["scored"] / each / prompts.batch / shape.heads,
        "device_bytes_per_layer": device,
        "host_bytes_per_layer": host,
        "roofline_ms_per_layer": roofline / 1e6,
        "kv_bytes_all_layers": cache.kv_bytes // layers * shape.layers,
        "index_bytes_per_layer": cache.index_bytes / layers,
    }


def of_token(
    row: Mapping[str, Any], prompts: Prompts, bandwidths: Mapping[str, float], model: DenseModel | None
) -> dict[str, Any]:
    """Milliseconds of a token: the layers' mean times their number, and of a model the output projection; the roofline
    likewise, with its weights."""
    layers = prompts.extended.shape.layers
    token, roofline = row["ms_per_layer"] * layers, row["roofline_ms_per_layer"] * layers
    dense = {}
    if model is not None:
        token += model.head_ms
        roofline += (layers * model.layer_bytes + model.head_bytes) / bandwidths["device"] / 1e6
        dense = {"dense_ms_per_layer": model.layer_ms, "head_ms": model.head_ms}
    return {
        **dense,
        "ms_per_token": token,
        "tokens_per_second": 1e3 * prompts.batch / token,
        "roofline_ms_per_token": roofline,
        "share_of_roofline": roofline / token,
    }


def remarks(cache: KV_Cache, strategy: str, row: Mapping[str, Any], device: str) -> list[str]:
    """What a reader must know of a row: what the cache noted, and whether all layers would fit the GPU's memory."""
    found = list(cache.stats.notes)
    if strategy == "full" and torch.device(device).type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        if row["kv_bytes_all_layers"] > there:
            found.append(
                f"keys and values of all layers are {row['kv_bytes_all_layers']} bytes, the GPU has {there}: no model "
                "could run this; the times are those of the layers that fit"
            )
    return found


_COLUMNS = (
    ("ms a token", "ms_per_token", 2),
    ("roofline", "roofline_ms_per_token", 2),
    ("ms a layer", "ms_per_layer", 3),
    ("attended", "tokens_attended", 0),
    ("clusters", "clusters_estimated", 0),
    ("scored", "keys_scored", 0),
    ("recall", "recall", 3),
    ("build s a layer", "fill_seconds_per_layer", 2),
)


def table(rows: Sequence[Mapping[str, Any]], head: bool = True) -> str:
    """The rows in Markdown; stages in ms a layer."""
    names = ["tokens", "batch", "strategy", *(title for title, _, _ in _COLUMNS), "stages, ms a layer"]
    lines = [f"| {' | '.join(names)} |", f"|---:|---:|---|{'---:|' * len(_COLUMNS)}---|"] if head else []
    for row in rows:
        cells = [f"{row[key]:.{digits}f}" if row.get(key) is not None else "-" for _, key, digits in _COLUMNS]
        stages = ", ".join(f"{stage} {spent:.3f}" for stage, spent in row["stage_ms_per_layer"].items())
        lines.append(f"| {row['context_len']} | {row['batch']} | {row['name']} | {' | '.join(cells)} | {stages} |")
    return "\n".join(lines)
