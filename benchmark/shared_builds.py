"""Several strategies after one prefill, with one build for those that can share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from cache_hub import KV_Cache, build_key
from cache_hub.eviction.shared_scores import shared_scores
from config import RetroInferConfig, with_estimation
from model_hub import LLM


@dataclass(frozen=True)
class Variant:
    """A strategy as it was named, with its settings; see with_estimation."""

    name: str
    strategy: str
    settings: RetroInferConfig


def shared_builds(names: Sequence[str], settings: RetroInferConfig) -> list[list[Variant]]:
    """The variants of these names, each once, those together that one filled cache can serve. ConfigError as
    with_estimation."""
    builds: dict[str, list[Variant]] = {}
    for name in dict.fromkeys(names):
        variant = Variant(name, *with_estimation(name, settings))
        builds.setdefault(build_key(variant.strategy, variant.settings), []).append(variant)
    return list(builds.values())


class PrefilledCaches:
    """The prompts' states in a cache for every build, made by one prefill. Generated tokens never enter an index, so
    that a cache can be rewound, and a variant's answer does not depend on which others it shares one with.

    logits [B, V]: of each prompt's last token. build_seconds: of all caches together.
    """

    def __init__(
        self,
        llm: LLM,
        ids: Tensor,
        names: Sequence[str],
        settings: RetroInferConfig,
        max_new_length: int,
        diagnose: bool = False,
    ) -> None:
        """ids [B, L]: prompts without padding."""
        graph = settings.attention_aware_graph.model_copy(update={"insert_batch": 0})
        self._builds = shared_builds(names, settings.model_copy(update={"attention_aware_graph": graph}))
        batch, length = ids.shape
        first = [(build[0].strategy, build[0].settings) for build in self._builds]
        largest = [(variant.strategy, variant.settings) for variant in map(_largest, self._builds)]
        llm.check_memory(largest, [length] * batch, max_new_length, batch)
        self._caches = llm.init_caches(first, [length] * batch, max_new_length, batch, diagnose)
        with shared_scores(self._caches):
            self.logits = llm.prefill(ids.to(llm.device), None, self._caches, batch)
        self.build_seconds = sum(cache.stats.seconds["build"] for cache in self._caches)

    def __iter__(self) -> Iterator[tuple[str, KV_Cache]]:
        """Each variant's name and its cache at the end of the prompts; a cache is freed behind its last variant."""
        for build in self._builds:
            cache = self._caches.pop(0)
            for variant in build:
                if variant is not build[0]:
                    cache.rewind()
                    cache.retune(variant.settings)
                yield variant.name, cache
            del cache


def _largest(build: list[Variant]) -> Variant:
    """The one of a build's variants that needs the most memory: clusters are all that they do not share."""
    return max(build, key=lambda variant: variant.settings.attention_aware_graph.estimation == "centroid")
