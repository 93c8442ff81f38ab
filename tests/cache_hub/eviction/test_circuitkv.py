"""The scores of circuitkv are those of the dense matrix, by query head, reduced over the group and pooled."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cache_hub.eviction import circuitkv
from cache_hub.eviction.circuitkv import CircuitKV, absorbing_chain_scores
from cache_hub.eviction.importance import rank_max_combination
from cache_hub.eviction.null_model import null_model_visits
from cache_hub.eviction.surrogate import surrogate_chain_scores
from config import ConfigError, RetroInferConfig

N, SINKS, WINDOW = 90, 3, 20
STARTS = {"query": "query", "hub": "uniform", "window": "window"}


def states(group: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(group)
    query = torch.randn(2, N, 2 * group, dim, generator=generator)
    return query, torch.randn(2, N, 2, dim, generator=generator)


def attention_of(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[B, H, n, n] float64."""
    group = query.shape[2] // key.shape[2]
    logits = torch.einsum("bihd,bjhd->bhij", query.double(), key.double().repeat_interleave(group, 2))
    future = torch.ones(N, N, dtype=torch.bool).triu(1)
    return logits.div(query.shape[3] ** 0.5).masked_fill(future, float("-inf")).softmax(-1)


def scorer_of(eviction: dict[str, Any], **walks: Any) -> CircuitKV:
    walks = {"window": WINDOW, **walks}
    return CircuitKV.of(RetroInferConfig(static_pattern_start=SINKS, eviction=eviction, circuitkv=walks))


@pytest.mark.parametrize(("group", "dim"), [(1, 64), (3, 64), (4, 128)])
@pytest.mark.parametrize("rows", ["exact", "window"])
@pytest.mark.parametrize(
    "kind", ["query", "hub", "window", "null_query", "null_hub", "null_window", "rank_max", "direct"]
)
def test_scores_are_those_of_the_whole_matrix(kind: str, rows: str, group: int, dim: int) -> None:
    query, key = states(group, dim)
    attention = attention_of(query, key)

    def visits(start: str) -> torch.Tensor:
        if rows == "window":
            return surrogate_chain_scores(attention[:, :, -WINDOW:], start, SINKS)
        return absorbing_chain_scores(attention, start, SINKS, window=WINDOW)

    if kind == "direct":
        by_head = attention[:, :, -WINDOW:].sum(2)
    elif kind == "rank_max":
        by_head = rank_max_combination(visits("query").float(), visits("uniform").float(), SINKS).double()
    else:
        start = STARTS[kind.removeprefix("null_")]
        by_head = visits(start)
        if kind.startswith("null_"):
            by_head = by_head / null_model_visits(N, start, SINKS, window=WINDOW, dtype=torch.float64)
    expected = by_head.unflatten(1, (2, group)).mean(2)
    found = scorer_of({"pooling": "none"}, score=kind, rows=rows).score(query, key)
    assert found.shape == (2, 2, N)
    # Two scores that float32 rounds to one change a rank by half a place.
    rough = {"rtol": 1e-4, "atol": 1e-5} if kind != "rank_max" else {"rtol": 0, "atol": 1 / (N - SINKS)}
    torch.testing.assert_close(found.double(), expected, **rough)


@pytest.mark.parametrize("kind", ["query", "null_hub"])
def test_probabilities_of_coming_to_a_token(kind: str) -> None:
    query, key = states(3, 64)
    attention = attention_of(query, key)
    start, own = STARTS[kind.removeprefix("null_")], attention.diagonal(dim1=2, dim2=3)
    by_head = circuitkv.visit_probabilities(absorbing_chain_scores(attention, start, SINKS), own, SINKS)
    if kind.startswith("null_"):
        uniform = torch.ones(N, N, dtype=torch.float64).tril() / torch.arange(1, N + 1)[:, None]
        visits = absorbing_chain_scores(uniform[None, None], start, SINKS)
        by_head = by_head / circuitkv.visit_probabilities(visits, uniform.diagonal()[None, None], SINKS)
    found = scorer_of({"pooling": "none"}, score=kind, count="probability").score(query, key)
    torch.testing.assert_close(found.double(), by_head.unflatten(1, (2, 3)).mean(2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("group", ["mean", "max"])
def test_what_is_between_sinks_and_window_is_pooled(pooling: str, group: str) -> None:
    query, key = states(3, 64)
    by_head = absorbing_chain_scores(attention_of(query, key), "query", SINKS).unflatten(1, (2, 3))
    plain = by_head.mean(2) if group == "mean" else by_head.amax(2)
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    found = scorer_of({"pooling": pooling, "group": group, "kernel_size": 5, "window": 8}, score="query").score(
        query, key
    )
    torch.testing.assert_close(found[..., SINKS:-8].double(), pool(plain[..., SINKS:-8], 5, 1, 2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[..., :SINKS].double(), plain[..., :SINKS], rtol=1e-4, atol=1e-6)


def test_short_prompts_are_observed_as_far_as_they_go() -> None:
    query, key = states(1, 64)
    for rows in ("exact", "window"):
        for score in ("window", "direct", "query"):
            scorer = scorer_of({"window": 2}, window=500, rows=rows, score=score)
            assert scorer.score(query[:, :9], key[:, :9]).isfinite().all()


@pytest.mark.parametrize(
    ("static", "walks", "message"),
    [
        (0, {}, "static_pattern_start: got 0, allowed with circuitkv: >= 1, since sinks absorb"),
        (4, {"rows": "window", "temperature": 2.0}, "circuitkv.temperature: got 2.0, allowed with rows=window: 1"),
    ],
)
def test_settings_that_do_not_go_together(static: int, walks: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CircuitKV.of(RetroInferConfig(static_pattern_start=static, circuitkv=walks))


def test_the_names_that_users_know() -> None:
    asked = {
        "compute_transition_matrix", "simulate_walks", "batched_walk_simulation", "causal_influence_walk",
        "compute_importance_scores", "select_top_k_tokens", "absorbing_chain_scores", "personalized_pagerank_scores",
        "effective_resistance_scores",
    }  # fmt: skip
    assert asked <= set(circuitkv.__all__)
    assert all(callable(getattr(circuitkv, name)) for name in circuitkv.__all__)
