"""Every strategy through RetroInfer's cache protocol, against plain softmax attention over the same tokens."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from cache_run import LAYERS, STEPS, Run, relative_error

from cache_hub import STRATEGIES, AttentionAwareGraphCache, FlatCache, make_cache, retrieving_layers
from cache_hub.layer_search import GraphLayerSearch, LayerSearch, layer_search
from config import ESTIMATIONS, RETRIEVAL_STRATEGIES, RetroInferConfig
from config.schema import ESTIMATING


def test_the_registry_and_the_configuration_name_the_same_strategies() -> None:
    assert (*STRATEGIES, "auto") == RETRIEVAL_STRATEGIES


def attend_to_all(strategy: str, n: int, estimation: str = "centroid") -> RetroInferConfig:
    """Settings under which every strategy finds all of n keys."""
    graph = {"top_k": n, "ef_search": n, "key_degree": 8, "key_links": 4, "index_dtype": "auto"}
    return RetroInferConfig(
        retrieval_strategy=strategy,
        attention_aware_graph={**graph, "estimation": estimation},
        ivf={"n_probe": n},
        hnsw={"m": n, "ef_construction": n, "ef_search": n},
    )


@pytest.mark.parametrize("lengths", [[1], [63], [257], [300, 131], [257, 20, 200]])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (3, 64), (4, 128)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_retrieving_everything_equals_full_attention(strategy: str, lengths: list[int], group: int, dim: int) -> None:
    run = Run(lengths, group, dim=dim)
    cache = make_cache(strategy, attend_to_all(strategy, 257), **run.common())
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5
    assert cache.stats.attended_share == 1.0


@pytest.mark.parametrize("estimation", ESTIMATIONS)
@pytest.mark.parametrize("strategy", ESTIMATING)
def test_retrieving_everything_equals_full_attention_with_any_estimate(strategy: str, estimation: str) -> None:
    run = Run([257, 20, 200])
    cache = make_cache(strategy, attend_to_all(strategy, 300, estimation), **run.common())
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5


def test_the_centroids_of_the_rest_come_nearer_to_full_attention_than_nothing() -> None:
    """On random states, which attend to everything a little."""
    run, errors = Run([1500], steps=3), []
    for estimation in ("none", "centroid"):
        cache = FlatCache(top_k=50, estimation=estimation, **run.common())
        run.prefill(cache)
        errors.append(relative_error(run.decode(cache), run.full_attention()))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize(("first", "second"), [("none", "centroid"), ("centroid", "none")])
def test_a_cache_rewound_and_retuned_answers_as_one_of_its_own(first: str, second: str) -> None:
    run = Run([300, 131])
    settings = {
        name: RetroInferConfig(attention_aware_graph={"estimation": name, "top_k": 20}) for name in (first, second)
    }
    caches = {
        name: make_cache("attention_aware_graph", settings[name], **run.common(diagnose=True)) for name in settings
    }
    for cache in caches.values():
        run.prefill(cache)
    run.decode(caches[first])
    assert type(caches[first]).build_key(settings[first]) == type(caches[first]).build_key(settings[second])
    caches[first].rewind()
    caches[first].retune(settings[second])
    assert torch.equal(run.decode(caches[first]), run.decode(caches[second]))
    stats = [caches[name].stats for name in (first, second)]
    for counter in ("attended", "attended_of", "estimated", "scored", "scored_of"):
        assert getattr(stats[0], counter) == getattr(stats[1], counter)
    assert all(cache.stats.agreement and cache.stats.agreement.steps.tolist() == [10, 10] for cache in caches.values())
    assert caches[first].stats.seconds["build"] > 0
    assert (caches[first].stats.seconds["cluster"] > 0) == (second == "centroid")
    assert caches[first].index_bytes == caches[second].index_bytes


@pytest.mark.parametrize("warm_start", [0, 7, 50])
@pytest.mark.parametrize("estimation", ["none", "softmax_lift"])
def test_each_search_starts_from_the_first_hits_of_the_step_before(
    estimation: str, warm_start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the sequences of each prefill call by themselves, in every layer; not from those before a rewind."""
    monkeypatch.setattr(retrieving_layers, "layer_search", LayerSearch)
    run = Run([300, 131])
    given: dict[tuple[int, int], list[Any]] = defaultdict(list)
    found: dict[tuple[int, int], list[Any]] = defaultdict(list)
    knobs = {"top_k": 20, "estimation": estimation, "warm_start": warm_start}
    cache = AttentionAwareGraphCache(**knobs, **run.common())
    run.prefill(cache)

    def spy(index: Any, key: tuple[int, int]) -> Any:
        search = index.search

        def spied(queries: torch.Tensor, k: int, near: torch.Tensor | None = None) -> Any:
            result = search(queries, k, near)
            given[key].append(near)
            found[key].append(result.ids[..., :20])
            return result

        return spied

    for layer, groups in enumerate(cache._groups):
        for number, group in enumerate(groups):
            group.index.search = spy(group.index, (layer, number))
    run.decode(cache)
    cache.rewind()
    run.decode(cache)
    assert len(given) == 4
    for key, near in given.items():
        for step in range(2 * run.steps):
            if warm_start == 0 or step % run.steps == 0:
                assert near[step] is None
            else:
                assert torch.equal(near[step], found[key][step - 1][..., :warm_start])


@pytest.mark.parametrize("insert_batch", [0, 5])
@pytest.mark.parametrize("estimation", ["none", "centroid"])
@pytest.mark.parametrize(("lengths", "warm_start"), [([300, 131], 0), ([150, 150, 80], 7), ([10, 140, 200], 50)])
def test_one_native_call_for_a_layer_does_what_single_searches_do(
    lengths: list[int], warm_start: int, estimation: str, insert_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For sequences of which one is attended in full, behind a rewind, and while generated tokens enter the index."""
    outs, scored = [], []
    for kind in (layer_search, LayerSearch):
        monkeypatch.setattr(retrieving_layers, "layer_search", kind)
        run = Run(lengths, steps=12)
        knobs = {"top_k": 20, "estimation": estimation, "warm_start": warm_start, "insert_batch": insert_batch}
        cache = AttentionAwareGraphCache(**knobs, **run.common(diagnose=True))
        run.prefill(cache)
        attended = [run.decode(cache)]
        if insert_batch:
            assert cache._inserted == 10
        else:
            cache.rewind()
            attended.append(run.decode(cache))
        outs.append(torch.stack(attended))
        scored.append((cache.stats.scored, cache.stats.attended, cache.stats.agreement))
        assert isinstance(cache._search_of(0), GraphLayerSearch) == (kind is layer_search)
    torch.testing.assert_close(outs[0], outs[1])
    assert scored[0][:2] == scored[1][:2]
    assert torch.equal(scored[0][2].recall, scored[1][2].recall)
    assert torch.equal(scored[0][2].scored, scored[1][2].scored)


def test_settings_that_need_another_build_have_another_key() -> None:
    keys = [
        STRATEGIES["attention_aware_graph"].build_key(RetroInferConfig(attention_aware_graph=options))
        for options in (
            {},
            {"top_k": 7, "ef_search": 9, "estimation": "none"},
            {"q_knn": 9},
            {"estimation": "softmax_lift"},
        )
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [[63], [300, 131]])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_retrieving_everything_on_a_gpu_with_the_prompt_in_pinned_memory(strategy: str, lengths: list[int]) -> None:
    run = Run(lengths, group=4, dim=128, device="cuda:0")
    cache = make_cache(strategy, attend_to_all(strategy, 300), **run.common(diagnose=True))
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("estimation", ESTIMATIONS)
@pytest.mark.parametrize("strategy", ["flat", "attention_aware_graph"])
def test_a_gpu_estimates_as_a_cpu_does(strategy: str, estimation: str) -> None:
    """Near ties may fall otherwise in clusters and graphs, so on average over steps and heads."""
    graph = {"top_k": 20, "estimation": estimation, "index_dtype": "auto"}
    outs = []
    for device in ("cpu", "cuda:0"):
        run = Run([700, 300], device=device)
        cache = make_cache(strategy, RetroInferConfig(attention_aware_graph=graph), **run.common())
        run.prefill(cache)
        outs.append(run.decode(cache).cpu())
    assert ((outs[1] - outs[0]).norm(dim=-1) / outs[0].norm(dim=-1)).mean() < 0.02


def test_flat_attends_to_the_exact_top_k_of_the_group_and_the_static_tokens() -> None:
    run, top_k = Run([200]), 7
    cache = FlatCache(static_pattern_start=4, static_pattern_end=16, top_k=top_k, **run.common())
    run.prefill(cache)
    out = run.decode(cache)[0, 1, 0]
    for head in range(6):
        kv_head = head // 3
        group = run.q[1, 0, 200, kv_head * 3 : kv_head * 3 + 3]
        k, v = run.k[1, 0, :201, kv_head], run.v[1, 0, :201, kv_head]
        best = set((group @ k[4:184].T).topk(top_k).indices.add(4).flatten().tolist())
        seen = sorted({0, 1, 2, 3} | best | set(range(184, 201)))
        expected = (run.q[1, 0, 200, head] @ k[seen].T).div(8).softmax(0) @ v[seen]
        torch.testing.assert_close(out[head], expected, rtol=1e-4, atol=1e-5)


def test_stats_count_attended_and_scored_tokens() -> None:
    run = Run([200], group=1)
    cache = FlatCache(static_pattern_start=4, static_pattern_end=16, top_k=7, **run.common())
    run.prefill(cache)
    run.decode(cache)
    contexts = sum(200 + step + 1 for step in range(STEPS))
    attended = sum(4 + 16 + 7 + step + 1 for step in range(STEPS))
    assert cache.stats.attended_share == pytest.approx(attended / contexts)
    assert cache.stats.scored_share == pytest.approx(STEPS * 180 / contexts)
    assert cache.stats.bytes_moved == STEPS * LAYERS * run.kv_heads * 7 * 2 * 64 * 4
    assert cache.kv_bytes == 2 * LAYERS * (200 + STEPS) * run.kv_heads * 64 * 4
    assert cache.index_bytes == 0


@pytest.mark.parametrize("length", [1, 50, 68, 100])
def test_a_context_too_short_to_index_is_attended_in_full_and_says_so(length: int) -> None:
    run = Run([length])
    cache = AttentionAwareGraphCache(**run.common())
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5
    assert cache.index_bytes == 0
    assert len(cache.stats.notes) == 1
    assert cache.stats.notes[0].startswith(f"{length} tokens are attended in full: 4 + 64 are static")


def test_one_token_more_is_indexed() -> None:
    run = Run([4 + 64 + 32 + 1])
    cache = AttentionAwareGraphCache(**run.common())
    run.prefill(cache)
    assert cache.index_bytes > 0
    assert cache.stats.notes == []


def test_diagnosis_of_the_flat_strategy_finds_everything() -> None:
    run = Run([150, 120])
    cache = FlatCache(top_k=10, diagnose=True, **run.common())
    run.prefill(cache)
    run.decode(cache)
    agreement = cache.stats.agreement
    assert agreement is not None
    assert agreement.steps.tolist() == [2 * STEPS] * LAYERS
    assert bool((agreement.mean(agreement.recall) == 1).all())
    assert torch.equal(agreement.mass, agreement.exact_mass)
    assert bool((agreement.mean(agreement.mass) < 1).all())
    assert agreement.scored.sum() == cache.stats.scored


def test_diagnosis_measures_recall_and_mass_of_the_graph() -> None:
    run = Run([400], group=1)
    cache = AttentionAwareGraphCache(top_k=10, ef_search=10, key_degree=4, key_links=2, diagnose=True, **run.common())
    run.prefill(cache)
    run.decode(cache)
    agreement = cache.stats.agreement
    assert agreement is not None
    recall = agreement.mean(agreement.recall)
    assert bool(((recall > 0.2) & (recall < 1)).all()), "a narrow beam on random keys finds some, not all"
    assert bool((agreement.mass <= agreement.exact_mass + 1e-6).all()), "nothing holds more mass than the exact top k"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k"])
def test_non_finite_states_raise_with_layer_and_position(name: str, value: float) -> None:
    run = Run([150, 120])
    cache = AttentionAwareGraphCache(**run.common())
    getattr(run, name)[1, 1, 30 + 77, 1, 5] = value
    full_name = {"q": "query", "k": "key"}[name]
    message = rf"{full_name}_states: got {value} in layer 1, sequence 1, position 77, head 1, allowed: finite"
    with pytest.raises(ValueError, match=message):
        run.prefill(cache)


def test_two_runs_are_identical() -> None:
    outs = []
    for _ in range(2):
        run = Run([300])
        cache = AttentionAwareGraphCache(top_k=20, **run.common())
        run.prefill(cache)
        outs.append(run.decode(cache))
    assert torch.equal(*outs)


def test_a_prompt_longer_than_the_cache_is_refused() -> None:
    run = Run([120])
    cache = FlatCache(**run.common(max_length=100 + STEPS))
    with pytest.raises(ValueError, match=r"prompt: got 120 tokens, allowed: at most 100"):
        run.prefill(cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"top_k: got 0"),
        ({"key_degree": 0}, r"key_degree: got 0, allowed: >= 2"),
        ({"static_pattern_end": 0}, r"static_pattern_start, static_pattern_end: got 4, 0"),
        ({"num_heads": 7}, r"num_heads: got 7, allowed: a multiple of 2 kv heads"),
        ({"max_length": 5}, r"max_length: got 5, allowed: more than max_new_length = 5"),
        ({"max_new_length": 0}, r"max_new_length: got 0, allowed: >= 1"),
    ],
)
def test_bad_options_are_answered_with_what_is_allowed(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionAwareGraphCache(**{**Run([150]).common(), **options})


def test_an_unknown_strategy_is_answered_with_the_known_ones() -> None:
    settings = RetroInferConfig(retrieval_strategy="flat")
    with pytest.raises(ValueError, match=r"retrieval_strategy: got 'annoy', allowed: full, flat, attention_aware"):
        make_cache("annoy", settings, **Run([150]).common())
