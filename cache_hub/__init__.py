"""KV caches: one class per family, one registry line per strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .cache import KV_Cache
from .faiss_cache import HNSWCache, IVFCache
from .flat_cache import FlatCache
from .full_cache import FullCache
from .graph_cache import AttentionAwareGraphCache
from .memory import RunShape, check_memory
from .retroinfer_cache import WaveIndexCache
from .stats import CacheStats

if TYPE_CHECKING:
    from config import RetroInferConfig

STRATEGIES: dict[str, type[KV_Cache]] = {
    "full": FullCache,
    "flat": FlatCache,
    "attention_aware_graph": AttentionAwareGraphCache,
    "wave_index": WaveIndexCache,
    "ivf": IVFCache,
    "hnsw": HNSWCache,
}


def make_cache(strategy: str, settings: RetroInferConfig, **common: Any) -> KV_Cache:
    """The cache of a strategy with its options from the configuration; `common` are KV_Cache's keywords.

    Raises ValueError for an unknown strategy, naming the known ones.
    """
    cache = _class_of(strategy, settings)
    return cache(**cache.options(settings), **common)


def check_fits(builds: Sequence[tuple[str, RetroInferConfig]], shape: RunShape) -> None:
    """Raises ValueError where the caches of these strategies and settings will not fit the memory that is available;
    see memory.check_memory. Also for an unknown strategy."""
    check_memory(" and ".join(dict(builds)), [(_class_of(*build), build[1]) for build in builds], shape)


def _class_of(strategy: str, settings: RetroInferConfig) -> type[KV_Cache]:
    if strategy not in STRATEGIES:
        raise ValueError(f"retrieval_strategy: got {strategy!r}, allowed: {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy].chosen(settings)


__all__ = [
    "STRATEGIES",
    "AttentionAwareGraphCache",
    "CacheStats",
    "FlatCache",
    "FullCache",
    "HNSWCache",
    "IVFCache",
    "KV_Cache",
    "RunShape",
    "WaveIndexCache",
    "check_fits",
    "make_cache",
]
