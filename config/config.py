"""Reads the configuration of a model and fits it to a context length, as RetroInfer's `generate_config` does."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config.schema import MAY_ESTIMATE, ModelConfig, RetroInferConfig, resolve_strategy
from config.section import ConfigError

CONFIG_DIR = Path(__file__).parent
NUMA_NODE_0 = Path("/sys/devices/system/node/node0/cpulist")

TOKENS_PER_CENTROID = 16
TOKENS_PER_SEGMENT = 8192
TOKENS_PER_PAGE = 8
SHORT_CONTEXT = 4096
SHORT_CONTEXT_BUFFER = 150


def load_config(model_name: str) -> dict[str, Any]:
    """The complete, validated configuration of a model: {"RetroInfer": {..}} with every key present.

    `model_name` is a hub name or a path; its last component names the file in config/. A model without a file gets
    the defaults of the typed configuration with the attention-aware graph, since the section does not depend on the
    model.

    Raises:
        ConfigError: a file that is not JSON (with its name and position), an unknown key, a value out of range.
    """
    return ModelConfig(**read_config(model_name)).model_dump()


def generate_config(
    model_name: str,
    context_len: int,
    attn_type: str,
    retrieval_budget: float = 0.018,
    estimation_budget: float = 0.232,
    cache_ratio: float = 0.0,
    use_cuda_graph: bool = False,
    gpu_only: bool = False,
    *,
    retrieval_strategy: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The model's configuration for one context length; arguments and meaning as in RetroInfer's config.py.

    The file's core, n_centroids, n_segment and pages_per_cluster are replaced by counts that fit the machine and
    `context_len` (tokens of the prompt), the budgets, cache_ratio and switches by the arguments, and
    buffer_cluster_num by 150 where the context has at most 4096 tokens. Then `retrieval_strategy` and `overrides`
    are applied: dotted keys below the section, {"attention_aware_graph.ef_search": 200}, with or without a leading
    "RetroInfer.". Everything is validated at the end, for the strategy that `attn_type` stands for.

    Raises:
        ConfigError: an unknown key, attention type or strategy, a value out of range, a top_k above `context_len`
            (the file's own is let pass where the context is attended in full anyway), a `retrieval_strategy` given
            beside an `attn_type` that runs another one.
    """
    if not isinstance(context_len, int) or isinstance(context_len, bool) or context_len < 1:
        raise ConfigError(f"context_len: got {context_len!r}, allowed: an integer >= 1")
    given = {override_key(key): value for key, value in (overrides or {}).items()}
    if retrieval_strategy is not None:
        given.setdefault("retrieval_strategy", retrieval_strategy)

    config = read_config(model_name)
    section = config["RetroInfer"]
    n_segment, n_centroids = cluster_counts(context_len)
    section |= {
        "core": _worker_cores(),
        "n_centroids": n_centroids,
        "n_segment": n_segment,
        "pages_per_cluster": round(TOKENS_PER_CENTROID / TOKENS_PER_PAGE),
        "retrieval_budget": retrieval_budget,
        "estimation_budget": estimation_budget,
        "cache_ratio": cache_ratio,
        "use_cuda_graph": use_cuda_graph,
        "gpu_only": gpu_only,
    }
    if context_len <= SHORT_CONTEXT:
        section["buffer_cluster_num"] = SHORT_CONTEXT_BUFFER
    for key, value in given.items():
        _set_key(section, key, value)

    settings = ModelConfig(**config).RetroInfer
    _check_run(settings, context_len, attn_type, given)
    return {"RetroInfer": settings.model_dump()}


def read_config(model_name: str) -> dict[str, Any]:
    """The content of a model's file (see load_config), of which only the outline is checked: a "RetroInfer" object."""
    path = CONFIG_DIR / f"{Path(model_name).name}.json"
    if not path.is_file():
        return {"RetroInfer": {"retrieval_strategy": "auto"}}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path.name}: not JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name}: not UTF-8 text, byte {error.start}: {error.reason}") from None
    if not isinstance(config, dict) or not isinstance(config.get("RetroInfer"), dict):
        raise ConfigError(f'{path.name}: got {config!r}, allowed: an object with the section "RetroInfer"')
    return config


def override_key(key: str) -> str:
    """The dotted key of an override without the optional leading "RetroInfer."."""
    return key.removeprefix("RetroInfer.")


def _set_key(section: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        inner = section.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"RetroInfer.{key}: unknown key, {name} is a value ({inner!r}) and has no keys")
        section = inner
    section[last] = copy.deepcopy(value)


def _check_run(settings: RetroInferConfig, context_len: int, attn_type: str, given: Mapping[str, Any]) -> None:
    strategy = resolve_strategy(attn_type, settings)
    if "retrieval_strategy" in given and strategy != settings.retrieval_strategy:
        raise ConfigError(
            f"retrieval_strategy: got {settings.retrieval_strategy!r}, but attn_type {attn_type!r} runs {strategy!r}; "
            f"allowed: {strategy!r}, or attn_type 'RetroInfer', which runs what retrieval_strategy names"
        )
    static = settings.static_pattern_start + settings.static_pattern_end
    indexed = strategy in MAY_ESTIMATE and context_len > static + settings.attention_aware_graph.key_degree
    key, top_k = settings.top_k_of(strategy)
    if top_k > context_len and (indexed or key in given):
        raise ConfigError(f"RetroInfer.{key}: got {top_k}, allowed: 1 to {context_len} (the context length)")
    keys, n_list = context_len - static, settings.ivf.n_list
    if strategy == "ivf" and n_list > keys > 0:
        raise ConfigError(f"RetroInfer.ivf.n_list: got {n_list}, allowed: 0 to {keys} (the keys to index)")


def cluster_counts(context_len: int) -> tuple[int, int]:
    """(n_segment, n_centroids) of a context: one segment for 8192 tokens, one centroid for 16, rounded.

    n_centroids is the multiple of lcm(8, n_segment) nearest to context_len / 16, the lower one where two are.
    """
    n_segment = max(round(context_len / TOKENS_PER_SEGMENT), 1)
    factor = math.lcm(8, n_segment)
    target = max(round(context_len / TOKENS_PER_CENTROID), factor)
    below = target // factor * factor
    return n_segment, below if target - below <= below + factor - target else below + factor


def _worker_cores() -> int:
    """Cores of NUMA node 0 (of the machine, where the system tells no nodes) minus 2, at least 1."""
    cores = os.cpu_count() or 1
    if NUMA_NODE_0.is_file():
        ranges = [part.split("-") for part in NUMA_NODE_0.read_text().strip().split(",") if part]
        cores = sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)
    return max(cores - 2, 1)
