"""KV caches: one class per family, one registry line per strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .cache import KV_Cache
from .eviction.baselines import H2O, PyramidKV, SnapKV, StreamingLLM
from .eviction.cache import EvictionCache, evicting
from .eviction.circuitkv import CircuitKV
from .faiss_cache import HNSWCache, IVFCache
from .flat_cache import FlatCache
from .full_cache import FullCache
from .graph_cache import AttentionAwareGraphCache
from .memory import RunShape, check_memory, fits
from .retroinfer_cache import WaveIndexCache
from .stats import CacheStats

if TYPE_CHECKING:
    from config import RetroInferConfig

# Which of two strategies it is, `settle` says.
AUTO = "auto"
# Tokens of a prompt that a GPU scans in less time than 16 CPU cores search the graph: one H100 did at 131,072, for
# 11.1 against 12.8 ms a token, but not at 524,288, for 18.2 against 14.7; lines through these cross at 260,000.
SCANNED_UP_TO = 1 << 18
STRATEGIES: dict[str, type[KV_Cache]] = {
    "full": FullCache,
    "flat": FlatCache,
    "attention_aware_graph": AttentionAwareGraphCache,
    "wave_index": WaveIndexCache,
    "ivf": IVFCache,
    "hnsw": HNSWCache,
    "streaming_llm": evicting(StreamingLLM),
    "h2o": evicting(H2O),
    "snapkv": evicting(SnapKV),
    "pyramidkv": evicting(PyramidKV),
    "circuitkv": evicting(CircuitKV),
}


def make_cache(strategy: str, settings: RetroInferConfig, **common: Any) -> KV_Cache:
    """The cache of a strategy with its options from the configuration; `common` are KV_Cache's keywords.

    Raises ValueError for an unknown strategy, naming the known ones.
    """
    cache = _class_of(strategy, settings)
    return cache(**cache.options(settings), **common)


def settle(builds: Sequence[tuple[str, RetroInferConfig]], shape: RunShape) -> list[tuple[str, RetroInferConfig]]:
    """The strategies and settings that caches are made of, where some are "auto".

    That is the exact scan on the GPU (flat, flat.on_gpu) where all layers are on GPUs, no prompt is longer than
    SCANNED_UP_TO, it serves the settings, and all the caches fit the memory that is available; else
    attention_aware_graph.
    """
    if all(strategy != AUTO for strategy, _ in builds):
        return list(builds)
    quick = all(device.type == "cuda" for device in shape.devices) and shape.longest <= SCANNED_UP_TO
    if quick and all(_can_scan(settings) for strategy, settings in builds if strategy == AUTO):
        scanning = [_scanning(settings) if strategy == AUTO else (strategy, settings) for strategy, settings in builds]
        if fits([(_class_of(*build), build[1]) for build in scanning], shape):
            return scanning
    return [("attention_aware_graph" if strategy == AUTO else strategy, settings) for strategy, settings in builds]


def build_key(strategy: str, settings: RetroInferConfig) -> str:
    """Equal for what one filled cache can serve, see KV_Cache.build_key; of "auto", whichever it will be."""
    return f"{strategy} {(AttentionAwareGraphCache if strategy == AUTO else STRATEGIES[strategy]).build_key(settings)}"


def _can_scan(settings: RetroInferConfig) -> bool:
    from .index.device_scan import MAX_TOP_K  # Triton only where it is used

    graph = settings.attention_aware_graph
    estimations = ("none", "centroid") if settings.flat.scan_share == 1 else ("centroid",)
    return graph.estimation in estimations and graph.top_k <= MAX_TOP_K


def _scanning(settings: RetroInferConfig) -> tuple[str, RetroInferConfig]:
    return "flat", settings.model_copy(update={"flat": settings.flat.model_copy(update={"on_gpu": True})})


def check_fits(builds: Sequence[tuple[str, RetroInferConfig]], shape: RunShape) -> None:
    """Raises ValueError where the caches of these strategies and settings will not fit the memory that is available;
    see memory.check_memory. Also for an unknown strategy."""
    check_memory(" and ".join(dict(builds)), [(_class_of(*build), build[1]) for build in builds], shape)


def _class_of(strategy: str, settings: RetroInferConfig) -> type[KV_Cache]:
    if strategy not in STRATEGIES:
        raise ValueError(f"retrieval_strategy: got {strategy!r}, allowed: {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy].chosen(settings)


__all__ = [
    "AUTO",
    "SCANNED_UP_TO",
    "STRATEGIES",
    "AttentionAwareGraphCache",
    "CacheStats",
    "EvictionCache",
    "FlatCache",
    "FullCache",
    "HNSWCache",
    "IVFCache",
    "KV_Cache",
    "RunShape",
    "WaveIndexCache",
    "build_key",
    "check_fits",
    "make_cache",
    "settle",
]
