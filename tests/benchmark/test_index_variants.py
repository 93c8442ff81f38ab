"""The variants of the tail estimate: exact where nothing is left out, equal to the caches that have them, bad flags."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_cases import write_trace

from benchmark.index import estimates, exact_head, variants
from benchmark.index.drive import ask, fill
from benchmark.index.exact_head import ClusterRule, ExactHead
from benchmark.index.reference import exact_attention, relative_errors
from benchmark.index.sweeps import Configuration
from benchmark.index.traces import LayerTrace, open_folder

TAIL, WAVE = variants.TAIL, variants.WAVE
GRAPH = "attention_aware_graph"


@pytest.fixture
def trace(tmp_path: Path) -> LayerTrace:
    return open_folder(write_trace(tmp_path / "a", n=700)).load(2)


def heads_of(trace: LayerTrace) -> list[ExactHead]:
    draws = variants.uniform_logs(trace)
    return [ExactHead(trace, i, draws[:, i]) for i in range(len(trace.keys))]


def from_cache(trace: LayerTrace, strategy: str, **graph: Any) -> tuple[torch.Tensor, dict[str, int]]:
    """Outputs [Hkv, g, t, d] of the strategy's cache in float32, and its counts."""
    changes = {f"{GRAPH}.{key}": value for key, value in graph.items()}
    settings = Configuration(strategy, strategy, changes).settings("tiny", trace.keys.shape[1], [])
    answers = ask(fill(strategy, settings, trace, "cpu", torch.float32, False)[0], trace)
    return answers.outputs, answers.counts


def test_every_row_is_exact_where_all_tokens_are_retrieved(tmp_path: Path) -> None:
    """16 tokens are indexed, fewer than any row's count; rows that stop before by their nature are asked apart."""
    trace = open_folder(write_trace(tmp_path / "a", n=84)).load(0)
    head, exact = heads_of(trace)[1], exact_attention(trace)[1]
    rows = variants.variants([32, 100])
    for stops in [name for name in rows if name.startswith(("until", "wave"))]:
        del rows[stops]
    rows["adaptive"] = lambda head: estimates.adaptive(head, 0.0, 100, TAIL, tail=False)
    rows["adaptive + tail"] = lambda head: estimates.adaptive(head, 0.0, 100, TAIL, tail=True)
    rows["wave"] = lambda head: estimates.wave(head, 1.0, 0.0)
    assert len(rows) > 60
    for name, variant in rows.items():
        outcome = variant(head)
        repeats = outcome.outputs.shape[1] // exact.shape[1]
        assert relative_errors(outcome.outputs, exact.repeat(1, repeats, 1)).max() < 1e-5, name
        assert (outcome.tokens, outcome.clusters) == (84, 0), name


def test_lift_with_all_tokens_drawn_is_exact_and_else_it_is_not(trace: LayerTrace) -> None:
    head, exact = heads_of(trace)[0], exact_attention(trace)[0].repeat(1, variants.SAMPLES, 1)
    for sample in ("own u", "own", "union"):
        everything, some = (estimates.lift(head, draws, sample) for draws in (632, 20))
        assert relative_errors(everything.outputs, exact).max() < 1e-5
        assert everything.tokens == 700
        assert relative_errors(some.outputs, exact).mean() > 1e-3
        assert some.tokens < 68 + 3 * 20 + 1


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("top_k", [5, 40])
def test_the_kept_centroid_is_centroid_tail(trace: LayerTrace, top_k: int, share: float) -> None:
    outputs, counts = from_cache(trace, "flat", top_k=top_k, estimation="centroid", estimation_budget=share)
    found = [estimates.top_with_tail(head, top_k, TAIL, share) for head in heads_of(trace)]
    assert relative_errors(torch.stack([one.outputs for one in found]), outputs).max() < 1e-4
    queries = trace.tests.shape[2]
    assert sum(one.tokens for one in found) * queries == pytest.approx(counts["attended"])
    # The cache reads every cluster, those too of which nothing is left.
    assert counts["estimated"] == 2 * queries * round(63 * share)
    assert sum(one.clusters for one in found) * queries <= counts["estimated"]


def test_the_union_is_softmax_lift(trace: LayerTrace) -> None:
    outputs, counts = from_cache(trace, "flat", top_k=30, estimation="softmax_lift")
    u = torch.rand(2, 632, generator=torch.Generator().manual_seed(0))  # as the cache draws
    log_u = (1 - u).log()[:, None, None].expand(2, 1, 3, 632)
    found = [estimates.lift(ExactHead(trace, i, log_u[i]), 30, "union") for i in range(2)]
    assert relative_errors(torch.stack([one.outputs for one in found]), outputs).max() < 1e-4
    assert sum(one.tokens for one in found) * trace.tests.shape[2] == pytest.approx(counts["attended"])


def test_the_wave_index_is_its_cache(tmp_path: Path) -> None:
    trace = open_folder(write_trace(tmp_path / "a", n=1400)).load(0)
    outputs, counts = from_cache(trace, "wave_index")
    found = [
        estimates.wave(head, exact_head.RETRIEVAL_BUDGET, exact_head.ESTIMATION_BUDGET) for head in heads_of(trace)
    ]
    assert relative_errors(torch.stack([one.outputs for one in found]), outputs).max() < 1e-4
    queries = trace.tests.shape[2]
    assert sum(one.tokens for one in found) * queries == pytest.approx(counts["attended"])
    assert sum(one.clusters for one in found) * queries == pytest.approx(counts["estimated"])


@pytest.mark.parametrize(("corrected", "rounded"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("rule", [TAIL, WAVE, ClusterRule("euclidean", 8), ClusterRule("metric", 16)])
def test_the_tail_by_hand(trace: LayerTrace, rule: ClusterRule, corrected: bool, rounded: bool) -> None:
    """One query in float64, cluster by cluster."""
    head, at = heads_of(trace)[1], 2
    retrieved = head.best(25).any(0)
    got = estimates.with_tail(head, retrieved, rule, corrected=corrected, rounded=rounded).outputs[:, at]
    narrow = (lambda x: x.bfloat16().double().numpy()) if rounded else (lambda x: x.double().numpy())
    clusters, taken = head.clusters(rule), retrieved[at].numpy()
    k, v, q = (x.double().numpy() for x in (trace.keys[1], trace.values[1], trace.tests[1, :, at]))
    indexed = np.arange(4, 636)
    rows = [(k[j], v[j], 1) for j in np.r_[:4, 636:700, indexed[taken]]]
    for c in range(len(clusters.sizes[0])):
        all_of = clusters.assignment[0].numpy() == c
        rest = indexed[all_of & ~taken]
        if len(rest):
            key = k[rest].mean(0) if corrected else narrow(clusters.centroids[0, c])
            mean = narrow(clusters.value_sums[0, c] / all_of.sum())
            value = (mean * all_of.sum() - v[indexed[all_of & taken]].sum(0)) / len(rest)
            rows.append((key, value, len(rest)))
    keys, values, sizes = (np.array(column) for column in zip(*rows, strict=True))
    weights = sizes * np.exp(q @ keys.T / 32**0.5)
    wanted = weights / weights.sum(1, keepdims=True) @ values
    assert relative_errors(got, torch.from_numpy(wanted)).max() < 1e-4


def test_near_lift_has_its_two_ends(trace: LayerTrace) -> None:
    head = heads_of(trace)[0]
    none_near = estimates.near_lift_far_centroids(head, 40, TAIL, 0.0)
    tail = estimates.top_with_tail(head, 20, TAIL)
    assert relative_errors(none_near.outputs, tail.outputs.repeat(1, variants.SAMPLES, 1)).max() < 1e-5
    assert (none_near.tokens, none_near.clusters) == (tail.tokens, tail.clusters)
    one_cluster = estimates.near_lift_far_centroids(head, 60, TAIL, 1 / 63)
    clusters, exact = head.clusters(TAIL), head.best(30).any(0)
    member = torch.nn.functional.one_hot(clusters.assignment[0].long(), 63).float()
    left = (~exact).float() @ member
    mass = (head.queries @ clusters.centroids[0].T + left.log()).softmax(-1).sum(0)
    near = member[:, mass.argmax(1)].T.bool() & ~exact
    assert near.sum(1).max() <= 30  # so that all of them are drawn
    certain = estimates.with_tail(head, exact | near, TAIL)
    assert relative_errors(one_cluster.outputs, certain.outputs.repeat(1, variants.SAMPLES, 1)).max() < 1e-5
    assert (one_cluster.tokens, one_cluster.clusters) == pytest.approx((certain.tokens, certain.clusters))


def test_the_adaptive_count_stops_at_the_bound(trace: LayerTrace) -> None:
    head = heads_of(trace)[0]
    counts = []
    for bound in (0.5, 0.2, 0.05):
        outcome = estimates.adaptive(head, bound, 632, TAIL, tail=False)
        counts.append(outcome.notes["count"])
        assert outcome.notes["below_bound"] == 1
        assert outcome.notes["missing_estimated"] < bound
        one_less = torch.cat((head.static_logits, head.logits), -1).softmax(-1)
        assert 0 <= outcome.notes["missing"] <= 1 - one_less[..., :68].sum(-1).min()
    assert 0 < counts[0] < counts[1] < counts[2] < 632
    cut = estimates.adaptive(head, 0.0, 10, TAIL, tail=True)
    assert (cut.notes["count"], cut.notes["below_bound"]) == (10, 0)
    same = estimates.top_with_tail(head, 10, TAIL)
    assert relative_errors(cut.outputs, same.outputs).max() < 1e-6
    assert (cut.tokens, cut.clusters) == (same.tokens, same.clusters)


def test_the_command_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_trace(tmp_path / name, tests=tests) for name, tests in (("a", 3), ("b", 0))]
    output = tmp_path / "o.json"
    words = ["--traces", *map(str, folders), "--output", str(output), "--top_k", "8", "--layers", "2"]
    assert variants.main(words) == 0
    printed, written = capsys.readouterr().out, json.loads(output.read_text())
    assert written["config"]["top_k"] == [8]
    assert written["environment"]["packages"]["torch"]
    assert [trace["trace"] for trace in written["traces"]] == ["a", "b"]
    assert [(trace["tokens"], trace["queries"], trace["layers"]) for trace in written["traces"]] == [
        (300, 3, [2]),
        (284, 16, [2]),
    ]
    trace = open_folder(folders[0], [2]).load(2)
    errors = relative_errors(
        torch.stack([estimates.top(head, 8, united=True).outputs for head in heads_of(trace)]), exact_attention(trace)
    )
    for record in written["traces"]:
        assert [row["name"] for row in record["rows"]] == list(variants.variants([8]))
        for row in record["rows"]:
            told = row["output_error"]
            assert 0 <= told["median"] <= told["p90"]
            assert told["worst_head"] == np.max(told["by_head"])
            assert row["rows_read"] == pytest.approx(row["tokens"] + row["clusters"], rel=1e-3)
            assert f"| {row['name']} | {told['median']:.4f} |" in printed
    (told,) = (row["output_error"] for row in written["traces"][0]["rows"] if row["name"] == "top 8")
    assert told["mean"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert told["median"] == pytest.approx(np.median(errors), rel=1e-4)
    np.testing.assert_allclose(told["by_head"], errors.mean(2).view(1, 6), rtol=1e-4)
    assert str(tmp_path) not in output.read_text()


def test_bad_flags_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, short = write_trace(tmp_path / "a"), write_trace(tmp_path / "short", n=83)
    for change, told in (
        ({"--top_k": ["0"]}, "top_k: got '0', allowed: different numbers >= 2"),
        ({"--top_k": ["8,x"]}, "top_k: got '8,x'"),
        ({"--top_k": ["8,8"]}, "top_k: got '8,8'"),
        ({"--layers": ["1-"]}, "layers: got '1-'"),
        ({"--layers": ["5"]}, "layers: got [5], allowed for"),
        ({"--traces": [str(tmp_path / "none")]}, "none does not exist"),
        ({"--traces": [str(good), str(good)]}, "the same trace is given twice"),
        ({"--traces": [str(short)]}, "has 83 tokens, allowed: at least 84"),
        ({"--output": [str(tmp_path / "no" / "o.json")]}, "no does not exist"),
    ):
        flags = {"--traces": [str(good)], "--output": [str(tmp_path / "o.json")], **change}
        assert variants.main([word for flag, values in flags.items() for word in (flag, *values)]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "o.json").exists()
