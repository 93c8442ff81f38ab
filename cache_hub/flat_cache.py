"""Exact top-k retrieval: the oracle of every comparison (with estimation none, RetrievalAttention's "Flat")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .index import TokenIndex, make_index
from .retrieval_cache import TokenIndexCache

if TYPE_CHECKING:
    from config import RetroInferConfig

    from .cache import KV_Cache


class FlatCache(TokenIndexCache):
    """Retrieves the exact top_k tokens per query head by scanning all keys at every step."""

    @classmethod
    def chosen(cls, settings: RetroInferConfig) -> type[KV_Cache]:
        if not settings.flat.on_gpu:
            return cls
        # Triton only where it is used.
        from .pruned_cache import PrunedFlatCache
        from .scanned_cache import ScannedFlatCache

        return ScannedFlatCache if settings.flat.scan_share == 1 else PrunedFlatCache

    @classmethod
    def index_of(cls, settings: RetroInferConfig) -> TokenIndex:
        return make_index("flat")

    def new_index(self) -> TokenIndex:
        return make_index("flat", num_threads=self.num_threads)
