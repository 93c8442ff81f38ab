"""What a generation cost: every stage has its place. And builds: each name once, each at its largest."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmark.measure import record
from benchmark.shared_builds import PrefilledCaches, shared_builds
from cache_hub import CacheStats
from config import RetroInferConfig
from model_hub import GenerationTiming


def test_every_stage_is_told_and_the_model_is_the_rest() -> None:
    spent = {"build": 5.0, "cluster": 2.0, "search": 1.0, "wait": 0.5, "attention": 0.25, "admit": 0.125}
    stats = CacheStats(seconds=defaultdict(float, {**spent, "update": 0.0625}))
    cache: Any = SimpleNamespace(stats=stats, index_bytes=1, kv_bytes=2)
    told = record(cache, GenerationTiming(7.0, 0.0, 4.0, 2))
    stages = told["ms_by_stage"]
    assert told["build_seconds_by_stage"]["cluster"] == 2.0
    assert (stages["admit"], stages["update"]) == (62.5, 31.25)
    assert stages["model"] == pytest.approx((4.0 - 1.0 - 0.5 - 0.25 - 0.125 - 0.0625) * 500)
    assert sum(stages.values()) == pytest.approx(told["ms_per_token"])


def test_a_name_given_twice_is_one_variant() -> None:
    builds = shared_builds(["full", "flat", "full", "flat+none", "flat"], RetroInferConfig())
    assert [[variant.name for variant in build] for build in builds] == [["full"], ["flat", "flat+none"]]


def test_a_build_is_checked_with_the_variant_that_needs_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the first: one that has clusters, before anything is made."""
    asked: list[list[tuple[str, str]]] = []

    class Checked:
        def check_memory(self, builds: Any, lengths: list[int], room: int, together: int) -> None:
            asked.append([(strategy, settings.attention_aware_graph.estimation) for strategy, settings in builds])
            assert (lengths, room, together) == ([7, 7], 3, 2)
            raise ValueError("too much")

    llm: Any = Checked()
    names = ["full", "flat+none", "flat+centroid", "attention_aware_graph+none"]
    with pytest.raises(ValueError, match="too much"):
        PrefilledCaches(llm, torch.zeros(2, 7, dtype=torch.int64), names, RetroInferConfig(), 3)
    assert [strategy for strategy, _ in asked[0]] == ["full", "flat", "attention_aware_graph"]
    assert [estimation for _, estimation in asked[0]][1:] == ["centroid", "none"]
