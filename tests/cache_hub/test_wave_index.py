"""The wave index strategy: against a float64 evaluation of its definition, full attention, and while it grows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import wave_oracle
from cache_run import LAYERS, STEPS, Run, relative_error

from attn_hub.reference import partial_attention
from cache_hub import WaveIndexCache, make_cache
from cache_hub.clusters import ClusterCounts
from config import RetroInferConfig, generate_config


class QuickToUpdate(WaveIndexCache):
    """Clusters 64 generated tokens at a time instead of 1024: 8 clusters, of which .25 retrieve 2 and .5 estimate 4."""

    update_tokens = 64


class OneTokenEach(WaveIndexCache):
    """As many clusters as tokens, one of them retrieved and all others estimated."""

    def counts_for(self, length: int) -> ClusterCounts:
        clusters = max(length - self.sinks - self.window, 1)
        return ClusterCounts(1, clusters, 1, clusters - 1)


def oracle_output(
    run: Run,
    layer: int,
    b: int,
    step: int,
    counts: list[tuple[int, ...]],
    update: int,
    made: WaveIndexCache | None = None,
) -> np.ndarray:
    """Output [H, D] of one step by the definition.

    counts: (segments, centroids, retrieved, estimated) of the prompt's clusters, then of the clusters of an update.
    made: a cache whose members of the prompt's clusters are taken, not those by the definition.
    """
    length, end = run.lengths[b], max(run.lengths) + step + 1
    tokens = slice(run.pads[b], end)
    k, v = (states[layer, b, tokens].double().numpy() for states in (run.k, run.v))
    bounds = [(4, length - 64)]
    while bounds[-1][1] + 64 + update <= len(k):
        bounds.append((bounds[-1][1], bounds[-1][1] + update))
    steady = np.r_[0:4, bounds[-1][1] : len(k)]
    outs = []
    for head in range(run.kv_heads):
        runs = [(k[first:last, head], v[first:last, head]) for first, last in bounds]
        used = [counts[min(i, 1)] for i in range(len(runs))]
        if made is None:
            clusters = [wave_oracle.cluster(*pair, *entry[:2]) for pair, entry in zip(runs, used, strict=True)]
        else:
            clusters = [wave_oracle.means(*runs[0], members_in(made, layer, b, head, runs[0][0]), used[0][1])]
        q = run.q[layer, b, end - 1, head * run.group : (head + 1) * run.group].double().numpy()
        budgets = (sum(entry[2] for entry in used), sum(entry[3] for entry in used))
        outs.append(wave_oracle.attention(q, (k[steady, head], v[steady, head]), runs, clusters, *budgets)[0])
    return np.concatenate(outs)


def members_in(cache: WaveIndexCache, layer: int, b: int, head: int, keys: np.ndarray) -> np.ndarray:
    """The cluster [N] of each of the keys [N, D], all different, of one prompt in the cache."""
    index = cache._indexes[layer]
    sizes, rows = index.sizes[b, head].cpu(), index.keys[b, head, : index.stored[b]].cpu().double().numpy()
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    stored = {row.tobytes(): c for row, c in zip(rows, clusters, strict=True)}
    return np.array([stored[row.tobytes()] for row in keys])


def test_every_step_equals_the_float64_evaluation_of_the_definition() -> None:
    run = Run([1500, 1300], group=3, dim=32, steps=3)
    run.k *= 3
    cache = WaveIndexCache(**run.common())
    run.prefill(cache)
    outs = run.decode(cache)
    budgets = {1500: (1, 96, 2, 22), 1300: (1, 80, 1, 19)}
    for step, layer, b in np.ndindex(3, LAYERS, 2):
        expected = oracle_output(run, layer, b, step, [budgets[run.lengths[b]]], 1024)
        assert relative_error(outs[step, layer, b], torch.tensor(expected)) < 1e-4


def test_every_step_equals_the_float64_evaluation_of_the_clusters_that_the_cache_made() -> None:
    run = Run([1500, 1300], group=3, dim=32, steps=1)
    cache = WaveIndexCache(**run.common())
    run.prefill(cache)
    outs = run.decode(cache)
    for b, budget in enumerate([(1, 96, 2, 22), (1, 80, 1, 19)]):
        expected = oracle_output(run, 1, b, 0, [budget], 1024, made=cache)
        assert relative_error(outs[0, 1, b], torch.tensor(expected)) < 1e-4


def test_every_step_while_growing_equals_the_definition() -> None:
    run = Run([700, 700], group=2, kv_heads=1, dim=32, steps=150)
    cache = QuickToUpdate(retrieval_budget=0.25, estimation_budget=0.5, **run.common())
    run.prefill(cache, together=2)
    outs = run.decode(cache)
    for step in [0, 62, 63, 64, 126, 127, 128, 149]:
        expected = oracle_output(run, 1, 1, step, [(1, 40, 10, 20), (1, 8, 2, 4)], 64)
        assert relative_error(outs[step, 1, 1], torch.tensor(expected)) < 1e-4, step


def test_every_token_is_in_one_cluster_or_in_the_steady_zone_while_1100_are_generated() -> None:
    run = Run([1200, 1100], group=1, kv_heads=2, dim=8, steps=1100)
    cache = WaveIndexCache(**run.common())
    run.prefill(cache)
    for step in range(1100):
        at = slice(1200 + step, 1201 + step)
        cache.decode_update_kv_cache(run.k[1, :, at], run.v[1, :, at], 1)
    index, zone = cache._indexes[1], cache._zones[1]
    assert [counts.centroids for counts in index.counts] == [72 + 64, 72 + 64]
    assert [(counts.retrieved, counts.estimated) for counts in index.counts] == [(1 + 1, 17 + 15)] * 2
    assert zone.counts == [68 + 1100 - 1024] * 2
    for b, length in enumerate(run.lengths):
        assert bool((index.sizes[b].sum(-1) + zone.counts[b] == length + 1100).all())
        for head in range(2):
            rows = index.rows_of(torch.arange(136).expand(2, 2, -1))[b, head]
            held = torch.cat((index.keys[b, head, rows[rows >= 0]], zone.keys[b, head, : zone.counts[b]]))
            given = run.k[1, b, run.pads[b] :, head]
            assert torch.equal(*(states[states[:, 0].argsort()] for states in (held, given)))
    assert bool(torch.isfinite(cache.compute(run.q[1, :, -1:], 1)).all())
    assert cache.stats.seconds["update"] > 0


def test_retrieving_all_clusters_equals_full_attention_before_and_after_an_update() -> None:
    run = Run([700, 300, 90], steps=70)
    cache = QuickToUpdate(retrieval_budget=1.0, **run.common())
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5
    assert cache.stats.attended_share == 1.0
    assert cache.stats.estimated == 0


def test_retrieval_budget_1_of_the_settings_equals_full_attention() -> None:
    run = Run([1400], dim=32)
    config = generate_config("unheard-of", 1400, "RetroInfer", 1.0, retrieval_strategy="wave_index")["RetroInfer"]
    cache = make_cache("wave_index", RetroInferConfig(**config), **run.common())
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5
    assert cache.stats.attended_share == 1.0


def test_clusters_of_one_token_equal_full_attention() -> None:
    run = Run([68 + 1040])
    half = torch.nn.functional.normalize(run.k[:, :, 4 : 4 + 520], dim=-1)
    # Keys of one length and mean 0: each is nearest to itself.
    run.k[:, :, 4 : 4 + 1040] = torch.cat((half, -half), 2)
    cache = OneTokenEach(**run.common())
    run.prefill(cache)
    assert bool((cache._indexes[0].sizes == 1).all())
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5
    assert cache.stats.estimated == STEPS * LAYERS * 2 * 1039


def test_equal_keys_are_estimated_exactly() -> None:
    run = Run([1200])
    run.k[:, :, 4 : 1200 - 64] = run.k[:, :, 4:5]
    cache = WaveIndexCache(retrieval_budget=0, estimation_budget=1.0, **run.common())
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5


def test_the_estimated_mass_is_a_lower_bound() -> None:
    run = Run([1200], group=2)
    run.k *= 2
    cache = WaveIndexCache(**run.common())
    run.prefill(cache)
    index, query = cache._indexes[0], run.q[0, :, 1200:1201]
    clusters = torch.arange(72)[:, None, None].expand(72, 2, 1)
    for i in range(72):
        estimated = partial_attention(query, index.estimated_part(clusters[None, i]))[1]
        true = partial_attention(query, index.retrieved_part(index.rows_of(clusters[None, i])))[1]
        assert bool((estimated <= true + 1e-5).all())


def test_sequences_prefilled_together_equal_each_alone() -> None:
    together, alone = Run([1200, 1200, 1200]), []
    cache = WaveIndexCache(**together.common(prefill_bsz=3))
    together.prefill(cache, together=3)
    out = together.decode(cache)
    for b in range(3):
        run = Run([1200, 1200, 1200])
        run.lengths, run.pads = [1200], [0]
        run.q, run.k, run.v = (states[:, b : b + 1] for states in (run.q, run.k, run.v))
        single = WaveIndexCache(**run.common())
        run.prefill(single)
        alone.append(run.decode(single)[:, :, 0])
    torch.testing.assert_close(out, torch.stack(alone, 2))


def test_padding_changes_nothing_and_short_prompts_are_attended_in_full() -> None:
    run = Run([1300, 200])
    cache = WaveIndexCache(**run.common())
    run.prefill(cache)
    out = run.decode(cache)
    assert relative_error(out[:, :, 1], run.full_attention()[:, :, 1]) < 1e-5
    alone = Run([1300, 200])
    alone.lengths, alone.pads = [1300], [0]
    alone.q, alone.k, alone.v = (states[:, :1] for states in (alone.q, alone.k, alone.v))
    single = WaveIndexCache(**alone.common())
    alone.prefill(single)
    torch.testing.assert_close(out[:, :, 0], alone.decode(single)[:, :, 0])


@pytest.mark.parametrize(("length", "indexed"), [(100, False), (1091, False), (1092, True)])
def test_a_prompt_too_short_to_cluster_is_attended_in_full_and_says_so(length: int, indexed: bool) -> None:
    run = Run([length])
    cache = WaveIndexCache(**run.common())
    run.prefill(cache)
    error = relative_error(run.decode(cache), run.full_attention())
    if indexed:
        assert cache.stats.notes == []
        assert cache.index_bytes > 0
        assert error > 1e-3
    else:
        expected = f"{length} tokens are attended in full: 4 + 64 are steady and fewer than 1024 others are too few to"
        assert [note.startswith(expected) for note in cache.stats.notes] == [True]
        assert cache.index_bytes == 0
        assert error < 1e-5


def test_a_short_prompt_stays_exact_however_much_is_generated() -> None:
    run = Run([70], steps=200)
    cache = QuickToUpdate(**run.common())
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5
    assert cache.stats.attended_share == 1.0


def test_stats_and_bytes() -> None:
    run = Run([2000], group=3)
    cache = WaveIndexCache(**run.common())
    run.prefill(cache)
    run.decode(cache)
    stats, calls = cache.stats, STEPS * LAYERS
    contexts = LAYERS * sum(2000 + step + 1 for step in range(STEPS))
    assert stats.scored_share == pytest.approx(128 * calls / contexts)
    assert stats.estimated == calls * 2 * 30
    steady = 2 * LAYERS * sum(68 + step + 1 for step in range(STEPS))
    assert stats.bytes_moved == (stats.attended - steady) * 2 * 64 * 4
    assert stats.attended_of == 2 * contexts
    assert cache.kv_bytes == 2 * LAYERS * (2000 + STEPS) * 2 * 64 * 4
    assert cache.index_bytes == LAYERS * 2 * 128 * (2 * 64 * 4 + 4 + 4)
    assert {"build", "store", "search", "attention"} <= stats.seconds.keys()


def test_diagnosis_measures_recall_and_mass() -> None:
    run = Run([1300, 1200])
    cache = WaveIndexCache(retrieval_budget=0.2, top_k=20, **run.common(diagnose=True))
    run.prefill(cache)
    run.decode(cache)
    agreement = cache.stats.agreement
    assert agreement is not None
    assert agreement.steps.tolist() == [2 * STEPS] * LAYERS
    assert agreement.scored.sum() == cache.stats.scored
    recall, mass = agreement.mean(agreement.recall), agreement.mean(agreement.mass)
    assert bool(((recall > 0.3) & (recall < 1)).all()), "a fifth of the clusters holds more than a fifth of the best"
    assert bool(((mass > 0.2) & (mass < 1)).all())
    everything = WaveIndexCache(retrieval_budget=1.0, top_k=20, **run.common(diagnose=True))
    run.prefill(everything)
    run.decode(everything)
    agreement = everything.stats.agreement
    assert agreement is not None
    assert bool((agreement.mean(agreement.recall) == 1).all())
    torch.testing.assert_close(agreement.mean(agreement.mass), torch.ones(LAYERS, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_definition(dtype: torch.dtype) -> None:
    run = Run([1500], steps=2)
    run.q, run.k, run.v = (states.to(dtype) for states in (run.q, run.k, run.v))
    cache = WaveIndexCache(retrieval_budget=0.3, estimation_budget=0.7, **run.common(dtype=dtype))
    run.prefill(cache)
    expected = oracle_output(run, 1, 0, 1, [(1, 96, 29, 67)], 1024)
    out = run.decode(cache)[1, 1, 0].double()
    # Rounding may swap the last cluster that is retrieved for the first that is estimated.
    assert (
        torch.tensor([relative_error(*pair) for pair in zip(out, torch.tensor(expected), strict=True)]).median() < 0.02
    )


def test_two_runs_are_identical() -> None:
    outs = []
    for _ in range(2):
        run = Run([1300], steps=2)
        cache = WaveIndexCache(**run.common())
        run.prefill(cache)
        outs.append(run.decode(cache))
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieval_budget": -0.1}, "retrieval_budget: got -0.1, allowed: 0 to 1"),
        ({"estimation_budget": 1.1}, "estimation_budget: got 1.1, allowed: 0 to 1"),
        ({"static_pattern_end": 0}, "static_pattern_start, static_pattern_end: got 4, 0"),
        ({"max_new_length": 0}, "max_new_length: got 0, allowed: >= 1"),
    ],
)
def test_bad_options_are_answered_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveIndexCache(**{**Run([150]).common(), **options})


def test_more_clusters_than_tokens_to_cluster() -> None:
    run = Run([20000], group=1, kv_heads=1, dim=4, steps=1)
    cache = WaveIndexCache(static_pattern_start=18900, **run.common())
    with pytest.raises(ValueError, match=r"got 18900, 64, which leave 1036 of 20000 tokens to 1248 clusters, allowed"):
        run.prefill(cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gpu_only", [False, True])
def test_on_a_gpu_every_step_equals_the_float64_evaluation_of_its_clusters(gpu_only: bool) -> None:
    run = Run([1500, 1300], group=4, dim=128, device="cuda:0", steps=3)
    cache = WaveIndexCache(gpu_only=gpu_only, **run.common())
    run.prefill(cache)
    outs = run.decode(cache).cpu()
    assert cache._indexes[0].keys.is_cuda == gpu_only
    run.q, run.k, run.v = run.q.cpu(), run.k.cpu(), run.v.cpu()
    budgets = {1500: (1, 96, 2, 22), 1300: (1, 80, 1, 19)}
    for step, layer, b in np.ndindex(3, LAYERS, 2):
        # Near ties fall another way there: nearest_centroid rounds the products.
        expected = oracle_output(run, layer, b, step, [budgets[run.lengths[b]]], 1024, made=cache)
        assert relative_error(outs[step, layer, b], torch.tensor(expected)) < 1e-3
