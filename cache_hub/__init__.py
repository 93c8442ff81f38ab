"""KV caches: one class per family, one registry line per strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .cache import KV_Cache
from .faiss_cache import HNSWCache, IVFCache
from .flat_cache import FlatCache
from .full_cache import FullCache
from .graph_cache import AttentionAwareGraphCache
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
    if strategy not in STRATEGIES:
        raise ValueError(f"retrieval_strategy: got {strategy!r}, allowed: {', '.join(STRATEGIES)}")
    cache = STRATEGIES[strategy]
    return cache(**cache.options(settings), **common)


__all__ = [
    "STRATEGIES",
    "AttentionAwareGraphCache",
    "CacheStats",
    "FlatCache",
    "FullCache",
    "HNSWCache",
    "IVFCache",
    "KV_Cache",
    "WaveIndexCache",
    "make_cache",
]
