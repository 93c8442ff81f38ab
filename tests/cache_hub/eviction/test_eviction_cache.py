"""Caches that keep a budget of each prompt: what they keep, and that they attend to all of it, and to nothing else."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from cache_run import LAYERS, Run, relative_error

from cache_hub import STRATEGIES, EvictionCache, make_cache
from cache_hub.eviction.shared_scores import shared_scores
from cache_hub.memory import RunShape
from config import EVICTING, ConfigError, RetroInferConfig, with_estimation

APPENDING = ("snapkv", "pyramidkv", "circuitkv")
ROLLING = ("streaming_llm", "h2o")
SETTINGS: dict[str, Any] = {"static_pattern_start": 3}


def made(strategy: str, run: Run, **eviction: Any) -> EvictionCache:
    cache = make_cache(strategy, RetroInferConfig(eviction=eviction, **SETTINGS), **run.common())
    assert isinstance(cache, EvictionCache)
    return cache


def places(cache: EvictionCache, run: Run, layer: int, b: int, head: int) -> list[int]:
    """Where in the sequence the tokens held are from, found by their values; none is held twice."""
    rows = int(cache._lengths[layer][b, head])
    held, given = cache._values[layer][b, head, :rows], run.v[layer, b, run.pads[b] :, head]
    found = (held[:, None] == given[None]).all(2)
    assert (found.sum(1) == 1).all()
    assert torch.equal(cache._keys[layer][b, head, :rows], run.k[layer, b, run.pads[b] :, head][found.int().argmax(1)])
    ids = sorted(found.int().argmax(1).tolist())
    assert len(set(ids)) == len(ids)
    return ids


def attention_over(run: Run, step: int, layer: int, b: int, head: int, tokens: list[int]) -> torch.Tensor:
    """[g, D]: of a kv head's queries to these tokens."""
    group = slice(head * run.group, (head + 1) * run.group)
    k, v = (states[layer, b, run.pads[b] :, head][tokens].double() for states in (run.k, run.v))
    q = run.q[layer, b, max(run.lengths) + step, group].double()
    return ((q @ k.T / run.dim**0.5).softmax(1) @ v).float()


@pytest.mark.parametrize("lengths", [[1], [8], [63], [40, 63]])
@pytest.mark.parametrize("strategy", EVICTING)
def test_a_prompt_within_the_budget_is_kept_whole(strategy: str, lengths: list[int]) -> None:
    run = Run(lengths)
    cache = made(strategy, run, budget=63 + run.steps)
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5
    assert cache.stats.attended_share == 1.0
    assert cache.kv_bytes == 2 * LAYERS * (sum(lengths) + run.steps * len(lengths)) * run.kv_heads * run.dim * 4


@pytest.mark.parametrize("lengths", [[64], [257, 90, 20]])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (3, 64), (4, 128)])
@pytest.mark.parametrize("strategy", EVICTING)
def test_the_budget_is_kept_exactly_and_attended_to(strategy: str, lengths: list[int], group: int, dim: int) -> None:
    run, budget = Run(lengths, group, dim=dim), 30
    cache = made(strategy, run, budget=budget)
    run.prefill(cache)
    scorer = cache.scorer
    kept = {}
    for layer, b, head in np.ndindex(LAYERS, len(lengths), run.kv_heads):
        kept[layer, b, head] = ids = places(cache, run, layer, b, head)
        n = lengths[b]
        if strategy != "pyramidkv":
            assert len(ids) == min(n, budget)
        assert set(range(min(scorer.sinks, n))) | set(range(max(n - scorer.window, 0), n)) <= set(ids)
    if strategy in ROLLING:
        return
    out = run.decode(cache)
    for (layer, b, head), ids in kept.items():
        for step in range(run.steps):
            generated = list(range(lengths[b], lengths[b] + step + 1))
            expected = attention_over(run, step, layer, b, head, ids + generated)
            assert relative_error(out[step, layer, b, head * group : (head + 1) * group], expected) < 1e-5
    held = sum(len(ids) for ids in kept.values())
    rows = LAYERS * run.kv_heads * len(lengths)
    assert cache.stats.attended == run.steps * held + rows * run.steps * (run.steps + 1) // 2
    assert cache.kv_bytes == 2 * (held + rows * run.steps) * dim * 4


@pytest.mark.parametrize("lengths", [[100], [50, 27, 3]])
@pytest.mark.parametrize("strategy", ROLLING)
def test_long_generations_stay_within_the_budget(strategy: str, lengths: list[int]) -> None:
    """Step by step against a plain rule: h2o drops what has had the least attention of all that is older than the
    window, streaming_llm the oldest behind the sinks."""
    run, budget = Run(lengths, steps=45), 28
    cache = made(strategy, run, budget=budget, window=5)
    run.prefill(cache)
    heads = list(np.ndindex(LAYERS, len(lengths), run.kv_heads))
    kept = {at: places(cache, run, *at) for at in heads}
    mass = {at: dict.fromkeys(ids, 0.0) for at, ids in kept.items()}
    for layer, b, head in heads:
        n, pad = lengths[b], run.pads[b]
        k = run.k[layer, b, pad : pad + n, head].double()
        q = run.q[layer, b, pad : pad + n, head * run.group : (head + 1) * run.group].double()
        weights = torch.einsum("igd,jd->gij", q, k).div(run.dim**0.5)
        weights = weights.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")).softmax(2)
        received = weights.sum(1).mean(0)
        for token in kept[layer, b, head]:
            mass[layer, b, head][token] = received[token].item()
    out = run.decode(cache)
    for step in range(run.steps):
        for at in heads:
            layer, b, head = at
            ids, now = kept[at], lengths[b] + step
            if len(ids) >= budget:
                if strategy == "h2o":
                    goes = min((i for i in ids if i <= now - 5), key=mass[at].__getitem__)
                else:
                    goes = min(i for i in ids if i >= 3)
                ids.remove(goes)
            ids.append(now)
            pad = run.pads[b]
            group = slice(head * run.group, (head + 1) * run.group)
            logits = run.q[layer, b, max(lengths) + step, group].double() @ run.k[layer, b, pad:, head][ids].double().T
            for token, weight in zip(ids, logits.div(run.dim**0.5).softmax(1).mean(0).tolist(), strict=True):
                mass[at][token] = mass[at].get(token, 0.0) + weight
            expected = attention_over(run, step, layer, b, head, ids)
            assert relative_error(out[step, layer, b, group], expected) < 1e-5
    for at in heads:
        assert places(cache, run, *at) == sorted(kept[at])
        assert len(kept[at]) == min(budget, lengths[at[1]] + run.steps)
        if strategy == "streaming_llm":
            assert sorted(kept[at]) == [0, 1, 2, *range(lengths[at[1]] + run.steps - 25, lengths[at[1]] + run.steps)]
    with pytest.raises(NotImplementedError):
        cache.rewind()


@pytest.mark.parametrize("strategy", APPENDING)
def test_what_was_generated_can_be_forgotten(strategy: str) -> None:
    run = Run([90])
    cache = made(strategy, run, budget=30)
    run.prefill(cache)
    first = run.decode(cache)
    cache.rewind()
    assert torch.equal(run.decode(cache), first)


def test_a_share_of_each_prompt() -> None:
    run = Run([200, 100])
    cache = made("snapkv", run, budget_share=0.2)
    run.prefill(cache)
    assert [cache._lengths[0][b].tolist() for b in range(2)] == [[40, 40], [20, 20]]


@pytest.mark.parametrize(
    ("strategy", "eviction", "message"),
    [
        ("snapkv", {"budget": 8}, "eviction.budget: got 8, allowed: at least 9, one more than the 0 sinks and the win"),
        ("streaming_llm", {"budget": 4}, "eviction.budget: got 4, allowed: at least 5, one more than the 3 sinks and"),
        ("h2o", {"budget_share": 0.05}, "eviction.budget_share: got 0.05 of 100 tokens, 5, allowed: at least 9"),
    ],
)
def test_a_budget_smaller_than_what_is_always_kept(strategy: str, eviction: dict[str, Any], message: str) -> None:
    """Told before a prompt is read: by the check of memory, and where the cache is made."""
    settings = RetroInferConfig(eviction=eviction, **SETTINGS)
    shape = RunShape((100,), 5, 6, 2, 64, 64, torch.float32, (torch.device("cpu"),))
    with pytest.raises(ConfigError, match=message):
        STRATEGIES[strategy].layer_needs(settings, shape, torch.device("cpu"))
    with pytest.raises(ConfigError, match=message):
        made(strategy, Run([100]), **eviction)


@pytest.mark.parametrize("strategy", EVICTING)
def test_stores_are_as_large_as_was_said(strategy: str) -> None:
    run = Run([500, 300], steps=20)
    shape = RunShape(tuple(run.lengths), run.steps, 6, 2, 64, 64, torch.float32, (torch.device("cpu"),) * LAYERS)
    for budget in (100, 510, 900):
        settings = RetroInferConfig(eviction={"budget": budget})
        cache = made(strategy, run, budget=budget)
        need, *scoring = STRATEGIES[strategy].layer_needs(settings, shape, torch.device("cpu"))
        # 8 rows of 500 tokens and 6 heads, and 2 heads' keys.
        observed = 4 * 500 * (6 * 8 + 2 * 64)
        assert [(more.when, more.nbytes) for more in scoring] == (
            [("build", observed)] if strategy in ("snapkv", "pyramidkv") and budget == 100 else []
        )
        held = sum(store.nbytes for store in cache._keys + cache._values) / LAYERS
        assert need.nbytes == pytest.approx(held, rel=0.02 if strategy == "pyramidkv" else 0)


@pytest.mark.parametrize("changes", [{}, {"score": "direct"}, {"rows": "window"}])
def test_what_scoring_takes_on_a_gpu_is_counted(changes: dict[str, Any]) -> None:
    """Of 32 heads of 128 at 32K: within a fifth of what one H200 held, eviction_time_llama_h200.json."""
    gpu = torch.device("cuda")
    shape = RunShape((32768,), 5, 32, 8, 128, 4096, torch.bfloat16, (gpu,))
    settings = RetroInferConfig.model_validate({"circuitkv": changes})
    _, scoring = STRATEGIES["circuitkv"].layer_needs(settings, shape, gpu)
    measured = {"direct": 514, "window": 90, None: 528}[next(iter(changes.values()), None)]
    assert 0.8 * measured <= scoring.nbytes / 2**20 <= measured


def test_variants_name_budgets_and_scores() -> None:
    settings = RetroInferConfig(eviction={"budget_share": 0.5})
    strategy, found = with_estimation("snapkv@512", settings)
    assert (strategy, found.eviction.budget, found.eviction.budget_share) == ("snapkv", 512, 0)
    strategy, found = with_estimation("circuitkv+null_hub@128", settings)
    assert (strategy, found.circuitkv.score, found.eviction.budget) == ("circuitkv", "null_hub", 128)
    assert with_estimation("h2o", settings) == ("h2o", settings)
    for name, message in (
        ("flat@512", "strategy: got 'flat@512', allowed: a budget of tokens behind streaming_llm, h2o"),
        ("snapkv@0", "strategy: got 'snapkv@0', allowed: a budget of tokens behind"),
        ("snapkv+none", "strategy: got 'snapkv\\+none', allowed: 'snapkv'; an estimation goes with flat"),
        ("circuitkv+none", "circuitkv.score: got 'none' in 'circuitkv\\+none', allowed: query, hub"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_estimation(name, settings)


def test_a_layer_makes_room_for_a_prompt_shorter_than_expected() -> None:
    """An upper layer of PyramidKV keeps less of a long prompt than of one within the budget."""
    run = Run([25])
    settings = RetroInferConfig(eviction={"budget": 30})
    cache = make_cache("pyramidkv", settings, **run.common(max_length=5000))
    assert isinstance(cache, EvictionCache)
    assert cache._keys[1].shape[2] < 25
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5


def test_equal_scorers_score_a_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that one prefill fills, layer by layer: the tokens that each keeps are those that it keeps alone."""
    run, budgets = Run([63, 90]), (20, 30, 20)
    scored: dict[str, int] = {}
    for name in ("snapkv", "h2o"):
        scorer = type(made(name, run).scorer)
        monkeypatch.setattr(scorer, "score", counting(scorer.score, name, scored))
    alone = [made(name, run, budget=budget) for name in ("snapkv", "h2o") for budget in budgets]
    for cache in alone:
        run.prefill(cache)
    assert scored == {name: len(budgets) * LAYERS * 2 for name in ("snapkv", "h2o")}
    scored.clear()
    together = [made(name, run, budget=budget) for name in ("snapkv", "h2o") for budget in budgets]
    prompt = max(run.lengths)
    with torch.inference_mode(), shared_scores(together):  # as a prefill
        run.q, run.k, run.v = run.q.clone(), run.k.clone(), run.v.clone()
        for b, layer, cache in itertools.product(range(2), range(LAYERS), together):
            states = (part[layer, b : b + 1, :prompt] for part in (run.q, run.k, run.v))
            cache.prefill_update_kv_cache(*states, layer, b)
    assert scored == {"snapkv": LAYERS * 2, "h2o": LAYERS * 2}
    assert all(cache.make_scores == cache.scorer.score for cache in together)
    for one, other in zip(alone, together, strict=True):
        for layer, b, head in np.ndindex(LAYERS, 2, run.kv_heads):
            assert places(one, run, layer, b, head) == places(other, run, layer, b, head)


def counting(score: Any, name: str, scored: dict[str, int]) -> Any:
    def counted(self: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        scored[name] = scored.get(name, 0) + 1
        return score(self, query, key)

    return counted
