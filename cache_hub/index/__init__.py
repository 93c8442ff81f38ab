"""Token indexes: one interface, one registry."""

from __future__ import annotations

from typing import Any

from .base import SearchResult, TokenIndex
from .flat_index import FlatIndex
from .graph_index import AttentionAwareGraphIndex
from .hnsw_index import HNSWIndex
from .ivf_index import IVFIndex

INDEXES: dict[str, type[TokenIndex]] = {
    "attention_aware_graph": AttentionAwareGraphIndex,
    "flat": FlatIndex,
    "ivf": IVFIndex,
    "hnsw": HNSWIndex,
}


def make_index(strategy: str, **options: Any) -> TokenIndex:
    """The index of a retrieval strategy. Raises ValueError for an unknown strategy or option, naming the known ones."""
    if strategy not in INDEXES:
        raise ValueError(f"strategy: got {strategy!r}, allowed: {', '.join(INDEXES)}")
    return INDEXES[strategy](**options)


__all__ = [
    "INDEXES",
    "AttentionAwareGraphIndex",
    "FlatIndex",
    "HNSWIndex",
    "IVFIndex",
    "SearchResult",
    "TokenIndex",
    "make_index",
]
