"""The attention-aware graph strategy (RetrievalAttention, section 3.2)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from config import GraphConfig

from .index import AttentionAwareGraphIndex, TokenIndex, make_index
from .retrieval_cache import TokenIndexCache

if TYPE_CHECKING:
    from config import RetroInferConfig


class AttentionAwareGraphCache(TokenIndexCache):
    """Retrieves tokens through one graph per kv head, built at prefill from the prompt's own queries.

    Takes the knobs of config.GraphConfig as keywords beside those of TokenIndexCache. A prompt with no more than
    key_degree tokens to index is attended in full: a graph over them would be complete.
    """

    def __init__(self, **options: Any) -> None:
        knobs = {name: options.pop(name) for name in GraphConfig.model_fields if name in options}
        self.graph = GraphConfig(**knobs)
        super().__init__(
            top_k=self.graph.top_k,
            min_indexed=self.graph.key_degree,
            warm_start=self.graph.warm_start,
            resume_ef=self.graph.resume_ef,
            estimation=self.graph.estimation,
            estimation_budget=self.graph.estimation_budget,
            insert_batch=self.graph.insert_batch,
            **options,
        )

    @classmethod
    def options(cls, settings: RetroInferConfig) -> dict[str, Any]:
        return {**super().options(settings), **settings.attention_aware_graph.model_dump()}

    @classmethod
    def index_of(cls, settings: RetroInferConfig) -> TokenIndex:
        return make_index("attention_aware_graph", **settings.attention_aware_graph.model_dump())

    @classmethod
    def most_in_full(cls, settings: RetroInferConfig) -> int:
        return settings.attention_aware_graph.key_degree

    @classmethod
    def built_settings(cls, settings: RetroInferConfig) -> dict[str, Any]:
        graph = settings.attention_aware_graph.model_dump(exclude=set(AttentionAwareGraphIndex.search_options))
        return super().built_settings(settings) | graph

    def new_index(self) -> TokenIndex:
        return make_index("attention_aware_graph", num_threads=self.num_threads, **self.graph.model_dump())

    def retune(self, settings: RetroInferConfig) -> None:
        super().retune(settings)
        self.graph = settings.attention_aware_graph
        for group in itertools.chain.from_iterable(self._groups):
            assert isinstance(group.index, AttentionAwareGraphIndex)
            group.index.options = group.index.options.model_copy(update={"ef_search": self.graph.ef_search})
