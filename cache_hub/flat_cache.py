"""Exact top-k retrieval: the oracle of every comparison (with estimation none, RetrievalAttention's "Flat")."""

from __future__ import annotations

from .index import TokenIndex, make_index
from .retrieval_cache import TokenIndexCache


class FlatCache(TokenIndexCache):
    """Retrieves the exact top_k tokens per query head by scanning all keys at every step."""

    def new_index(self) -> TokenIndex:
        return make_index("flat", num_threads=self.num_threads)
