"""Retrieval through the indexes of faiss (with estimation none, RetrievalAttention's baselines)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from config import HNSWConfig, IVFConfig

from .index import INDEXES, TokenIndex, make_index
from .retrieval_cache import TokenIndexCache

if TYPE_CHECKING:
    from config import RetroInferConfig


class _FaissCache(TokenIndexCache):
    """Takes the knobs of its section of the configuration as keywords beside those of TokenIndexCache."""

    strategy: ClassVar[str]
    section: ClassVar[type[IVFConfig] | type[HNSWConfig]]

    def __init__(self, **options: Any) -> None:
        names = self.section.model_fields.keys() - {"top_k"}
        self.knobs = {name: options.pop(name) for name in names & options.keys()}
        self.section(**self.knobs)
        super().__init__(**options)

    @classmethod
    def options(cls, settings: RetroInferConfig) -> dict[str, Any]:
        own = getattr(settings, cls.strategy).model_dump()
        return {**super().options(settings), **own, "top_k": settings.top_k_of(cls.strategy)[1]}

    @classmethod
    def built_settings(cls, settings: RetroInferConfig) -> dict[str, Any]:
        own = getattr(settings, cls.strategy).model_dump(exclude=set(INDEXES[cls.strategy].search_options))
        return super().built_settings(settings) | own

    @classmethod
    def index_of(cls, settings: RetroInferConfig) -> TokenIndex:
        return make_index(cls.strategy, **getattr(settings, cls.strategy).model_dump())

    def new_index(self) -> TokenIndex:
        return make_index(self.strategy, num_threads=self.num_threads, **self.knobs)


class IVFCache(_FaissCache):
    """Retrieves tokens through inverted lists over the prompt's keys."""

    strategy, section = "ivf", IVFConfig


class HNSWCache(_FaissCache):
    """Retrieves tokens through an HNSW graph over the prompt's keys."""

    strategy, section = "hnsw", HNSWConfig
