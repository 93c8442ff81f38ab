"""The bench: its numbers against plain numpy, its rows, what it shares, resumes and refuses."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_cases import attention, random_head, write_trace

from benchmark.index import __main__ as command
from benchmark.index import bench
from benchmark.index.reference import exact_attention, relative_errors
from benchmark.index.sweeps import choose, read_sweep
from benchmark.index.traces import open_folder
from cache_hub import STRATEGIES, CacheStats, FlatCache
from config import EVICTING
from config.schema import ESTIMATING

SWEEPS = sorted((Path(command.__file__).parent / "sweeps").glob("*.json"))
GRAPH = "attention_aware_graph"


def measure(folder: Path, output: Path, *words: str) -> list[dict[str, Any]]:
    assert command.main(["--traces", str(folder), "--output", str(output), *words]) == 0
    return json.loads(output.read_text())["rows"]


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The strategies whose caches were filled, one entry a layer."""
    calls: list[str] = []
    fill: Callable[..., Any] = bench.fill

    def counted(strategy: str, *rest: Any) -> Any:
        calls.append(strategy)
        return fill(strategy, *rest)

    monkeypatch.setattr(bench, "fill", counted)
    return calls


@pytest.mark.parametrize(("n", "dim", "group"), [(200, 16, 1), (300, 32, 3), (600, 64, 3)])
def test_attending_to_everything_has_no_error(tmp_path: Path, n: int, dim: int, group: int) -> None:
    folder = write_trace(tmp_path / "a", n=n, dim=dim, group=group)
    knobs = ("--set", f"{GRAPH}.top_k={n}", "--set", f"{GRAPH}.estimation=none")
    rows = measure(folder, tmp_path / "o.json", "--strategies", "full,flat", *knobs)
    for row in rows:
        assert row["output_error"]["worst_head"] < 1e-5
        assert row["tokens_attended"] == n
        assert row["bytes_read"] == 2 * n * dim * 4
        assert np.shape(row["output_error"]["by_head"]) == (2, 2 * group)
    full, flat = rows
    assert (full["recall"], full["mass"], full["keys_scored"], full["index_bytes"]) == (None, None, 0, 0)
    assert flat["recall"]["mean"] == flat["mass_of_exact"]["mean"] == 1.0
    assert flat["mass"]["mean"] == pytest.approx(1.0, abs=1e-5)
    assert flat["keys_scored_by_head"] == [[n - 68] * 2 * group] * 2
    assert "keys_scored_by_head" not in full
    assert (flat["tokens"], flat["queries"], flat["layers"], flat["trace"]["model"]) == (n, 4, [0, 2], "tiny")


@pytest.mark.parametrize("tests", [5, 0])
def test_flat_against_plain_numpy(tmp_path: Path, tests: int) -> None:
    top_k, sinks, window, layers = 20, 3, 10, (0, 2)
    folder = write_trace(tmp_path / "a", tests=tests)
    errors, masses, unions = [], [], []
    for layer in layers:
        for head in range(2):
            arrays = random_head(seed=100 * layer + head, tests=tests)
            q, k, v = (arrays[name] for name in ("q_decode", "k", "v"))
            if tests == 0:
                q, k, v = arrays["q"][:, -16:], k[:-16], v[:-16]
            n = len(k)
            middle = np.arange(sinks, n - window)
            scores = q.astype(np.float64) @ k[middle].astype(np.float64).T
            static = np.r_[:sinks, n - window : n]
            for step in range(q.shape[1]):
                found = [middle[np.argsort(-scores[h, step])[:top_k]] for h in range(3)]
                attended = np.union1d(np.concatenate(found), static)
                unions.append(len(attended))
                for h in range(3):
                    exact = attention(q[h, step : step + 1], k, v)
                    kept = attention(q[h, step : step + 1], k[attended], v[attended])
                    errors.append(np.linalg.norm(kept - exact) / np.linalg.norm(exact))
                    held = attention(q[h, step : step + 1], k, np.isin(np.arange(n), attended)[:, None])
                    masses.append(held.item())
    sections = ("static_pattern_start", sinks), ("static_pattern_end", window), (f"{GRAPH}.top_k", top_k)
    sections += ((f"{GRAPH}.estimation", "none"),)
    flags = [word for key, value in sections for word in ("--set", f"{key}={value}")]
    (row,) = measure(folder, tmp_path / "o.json", "--strategies", "flat", *flags)
    by_head = np.array(errors).reshape(2, 2, -1, 3).transpose(0, 1, 3, 2)
    told = row["output_error"]
    assert told["mean"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert told["median"] == pytest.approx(np.median(errors), rel=1e-4)
    assert told["p90"] == pytest.approx(np.quantile(errors, 0.9), rel=1e-4)
    heads = by_head.mean(3).reshape(2, 6)
    assert told["worst_head"] == pytest.approx(heads.max(), rel=1e-4)
    assert told["worst_head_at"] == {"layer": layers[heads.argmax() // 6], "query_head": heads.argmax() % 6}
    np.testing.assert_allclose(told["by_head"], heads, rtol=1e-4)
    assert row["mass"]["mean"] == pytest.approx(np.mean(masses), rel=1e-4)
    assert row["recall"]["mean"] == row["mass_of_exact"]["mean"] == 1.0
    assert row["tokens_attended"] == pytest.approx(np.mean(unions), rel=1e-5)
    assert row["bytes_read"] == pytest.approx(2 * np.mean(unions) * 32 * 4, rel=1e-5)
    assert row["keys_scored"] == row["tokens"] - sinks - window
    assert row["scoring_bytes"] == row["keys_scored"] * 3 * 32 * 4
    assert row["held_out"] == (tests == 0)


def test_the_reference_and_the_error(tmp_path: Path) -> None:
    trace = open_folder(write_trace(tmp_path / "a")).load(0)
    exact = exact_attention(trace)
    arrays = random_head(seed=1)
    by_hand = attention(arrays["q_decode"][2], arrays["k"], arrays["v"])
    np.testing.assert_allclose(exact[1, 2].numpy(), by_hand, rtol=1e-10)
    assert relative_errors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])).tolist() == [
        pytest.approx(4 / 3),
        0.0,
    ]


def test_rows_that_differ_in_search_share_a_build_and_are_as_alone(tmp_path: Path, fills: list[str]) -> None:
    folder = write_trace(tmp_path / "a", n=400)
    changes = [{"ef_search": 20, "top_k": 20}, {"ef_search": 60, "top_k": 20}, {"ef_search": 60, "top_k": 10}]
    sweep = [
        {"name": str(i), "strategy": GRAPH, "set": {f"{GRAPH}.{key}": value for key, value in change.items()}}
        for i, change in enumerate(changes)
    ]
    sweep.append({**sweep[0], "name": "other build", "set": {**sweep[0]["set"], f"{GRAPH}.key_degree": 30}})
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    together = measure(folder, tmp_path / "o.json", "--sweep", str(tmp_path / "sweep.json"))
    assert fills == [GRAPH] * 4  # two builds of two layers
    for i, row in enumerate(together):
        (tmp_path / "alone.json").write_text(json.dumps([sweep[i]]))
        (alone,) = measure(folder, tmp_path / f"o{i}.json", "--sweep", str(tmp_path / "alone.json"))
        timed = {"build_seconds", "build_seconds_by_stage", "ms_per_query_and_layer"}
        assert {key: row[key] for key in row.keys() - timed} == {key: alone[key] for key in alone.keys() - timed}
    assert together[0]["keys_scored"] < together[1]["keys_scored"]
    assert together[2]["tokens_attended"] < together[1]["tokens_attended"]
    assert together[1]["recall"]["mean"] >= together[0]["recall"]["mean"] > 0.5


def test_each_row_states_the_build_of_its_own(tmp_path: Path) -> None:
    folder, sweep = write_trace(tmp_path / "a", n=400), tmp_path / "sweep.json"
    told = [("none", 20), ("centroid", 20), ("none", 10)]
    names = [{f"{GRAPH}.estimation": estimation, f"{GRAPH}.top_k": top_k} for estimation, top_k in told]
    sweep.write_text(json.dumps([{"name": str(i), "strategy": "flat", "set": each} for i, each in enumerate(names)]))
    rows = measure(folder, tmp_path / "o.json", "--sweep", str(sweep))
    seconds = [row["build_seconds"] for row in rows]
    stages = [row["build_seconds_by_stage"] for row in rows]
    assert seconds[1] > seconds[0] == seconds[2]
    assert seconds[1] - seconds[0] == pytest.approx(stages[1]["build"] - stages[0]["build"], rel=1e-3)
    assert all({"search", "attention", "diagnosis"}.isdisjoint(each) for each in stages)


def test_finished_rows_are_kept_and_another_protocol_is_refused(
    tmp_path: Path, fills: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write_trace(tmp_path / name) for name in "ab"]
    np.savez(folders[1] / "layer00_head00.npz", **random_head(seed=9))
    words = ["--traces", *map(str, folders), "--output", str(tmp_path / "o.json"), "--set", f"{GRAPH}.top_k=20"]
    assert command.main([*words, "--strategies", "flat"]) == 0
    first = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert [row["trace"]["folder"] for row in first] == ["a", "b"]
    assert fills == ["flat"] * 4
    assert command.main([*words, "--strategies", "flat,full"]) == 0
    assert fills == ["flat"] * 4 + ["full"] * 4
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert rows[:2] == first
    assert [row["name"] for row in rows] == ["flat", "flat", "full", "full"]
    assert rows[0]["environment"]["packages"]["torch"]
    assert rows[0]["settings"][GRAPH]["top_k"] == 20
    assert command.main([*words, "--strategies", "flat", "--set", f"{GRAPH}.top_k=21"]) == 2
    assert command.main([*words[:-1], f"{GRAPH}.top_k=21", "--strategies", "flat"]) == 0
    assert len(fills) == 12
    for change, told in (
        (["--dtype", "bf16"], "dtype: 'fp32' there, 'bf16' now"),
        (["--layers", "0"], "layers: 'all' there, [0] now"),
        (["--metrics", "recall"], "metrics: ['bytes', 'mass', 'output_error', 'recall'] there, ['recall'] now"),
    ):
        assert command.main([*words, "--strategies", "flat", *change]) == 2
        assert told in capsys.readouterr().err
    assert len(fills) == 12


def test_a_kill_loses_no_finished_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fills: list[str]) -> None:
    folder, output = write_trace(tmp_path / "a"), tmp_path / "o.json"
    words = ["--traces", str(folder), "--output", str(output), "--set", f"{GRAPH}.top_k=20"]
    ask: Callable[..., Any] = bench.ask

    def killed(cache: Any, trace: Any) -> Any:
        if isinstance(cache, FlatCache) and trace.layer == 2:
            raise KeyboardInterrupt
        return ask(cache, trace)

    monkeypatch.setattr(bench, "ask", killed)
    with pytest.raises(KeyboardInterrupt):
        command.main([*words, "--strategies", "full,flat"])
    assert [row["name"] for row in json.loads(output.read_text())["rows"]] == ["full"]
    monkeypatch.setattr(bench, "ask", ask)
    assert [row["name"] for row in measure(folder, output, *words[4:], "--strategies", "full,flat")] == ["full", "flat"]
    assert fills == ["full", "full", "flat", "flat", "flat", "flat"]


def test_bytes_scored_are_those_of_the_type_that_search_reads(tmp_path: Path) -> None:
    folder, sweep = write_trace(tmp_path / "a", n=1300, dim=32, group=3), tmp_path / "sweep.json"
    small = {f"{GRAPH}.top_k": 20, f"{GRAPH}.ef_search": 24}
    cases: list[tuple[str, dict[str, Any], int]] = [  # bytes of a key
        (GRAPH, {"index_dtype": "auto"}, 32 * 4),
        (GRAPH, {"index_dtype": "bfloat16"}, 32 * 2),
        (GRAPH, {"index_dtype": "bfloat16", "estimation": "softmax_lift"}, 32 * 2 + 4),
        (GRAPH, {"index_dtype": "int8"}, 32 + 4),
        ("flat", {}, 32 * 4),
        ("flat", {"estimation": "softmax_lift"}, 33 * 4),
        ("hnsw", {}, 32 * 4),
        ("wave_index", {}, 32 * 4),
    ]
    rows = [
        {"name": str(i), "strategy": strategy, "set": small | {f"{GRAPH}.{key}": value for key, value in own.items()}}
        for i, (strategy, own, _) in enumerate(cases)
    ]
    sweep.write_text(json.dumps(rows))
    for row, (_, own, key_bytes) in zip(
        measure(folder, tmp_path / "o.json", "--sweep", str(sweep)), cases, strict=True
    ):
        beam = 24 * (32 * 4 - key_bytes) if own.get("index_dtype") == "int8" else 0
        assert row["keys_scored"] > 24
        assert row["scoring_bytes"] == pytest.approx(3 * (row["keys_scored"] * key_bytes + beam), rel=1e-5)
    (half,) = measure(folder, tmp_path / "half.json", "--strategies", "ivf", "--dtype", "bf16")
    assert half["scoring_bytes"] == pytest.approx(half["keys_scored"] * 3 * 32 * 4, rel=1e-5)


def test_metrics_and_layers_are_chosen(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "a", layers=(0, 1, 2))
    words = ["--strategies", "flat", "--set", f"{GRAPH}.top_k=20", "--layers", "1-2"]
    (row,) = measure(folder, tmp_path / "o.json", *words, "--metrics", "recall,bytes")
    assert row["layers"] == [1, 2]
    assert row["recall"]["mean"] == 1.0
    assert row["bytes_read"] > 0
    assert not {"mass", "mass_of_exact", "output_error"} & row.keys()
    (row,) = measure(folder, tmp_path / "o2.json", *words, "--metrics", "output_error")
    assert row["output_error"]["median"] > 0
    assert not {"recall", "mass", "bytes_read"} & row.keys()


def test_a_strategys_own_counters_and_estimates_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Counters(CacheStats):
        estimated: int = 0
        mine: int = 0

    class Estimating(FlatCache):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.stats = Counters(agreement=self.stats.agreement)

        def compute(self, query_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
            self.stats.estimated += 7 * self.kv_head
            self.stats.mine += 3
            return super().compute(query_states, layer_idx)

    monkeypatch.setitem(STRATEGIES, "flat", Estimating)
    folder = write_trace(tmp_path / "a")
    flags = ("--set", f"{GRAPH}.top_k=20", "--set", f"{GRAPH}.estimation=none")
    (row,) = measure(folder, tmp_path / "o.json", "--strategies", "flat", *flags)
    assert row["rows_estimated"] == 7
    assert row["counts"]["mine"] == 3
    assert row["estimate_bytes"] == 2 * 7 * 32 * 4
    assert row["bytes_read"] == pytest.approx(2 * (row["tokens_attended"] + 7) * 32 * 4)


def test_bfloat16_stores(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "a")
    (row,) = measure(folder, tmp_path / "o.json", "--strategies", "full", "--dtype", "bf16")
    assert 1e-4 < row["output_error"]["median"] < 2e-2
    assert row["bytes_read"] == 2 * 300 * 32 * 2


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_the_shipped_sweeps_are_valid_and_their_names_say_what_they_estimate(sweep: Path) -> None:
    rows = read_sweep(sweep)
    settings = [row.settings("tiny", 8192, ()) for row in rows]
    assert {row.strategy for row in rows} <= set(STRATEGIES)
    assert len({each.model_dump_json() + row.strategy for row, each in zip(rows, settings, strict=True)}) == len(rows)
    assert {row.strategy for row in choose(["flat"], sweep)} == {"flat"}
    for row, each in zip(rows, settings, strict=True):
        if row.strategy in ESTIMATING:
            told = "centroid" if "centroids" in row.name else "softmax_lift" if "lifted" in row.name else "none"
            assert each.attention_aware_graph.estimation == told, row.name


def test_a_sweep_has_every_strategy_that_retrieves() -> None:
    (sweep,) = (path for path in SWEEPS if path.stem == "strategies")
    assert {row.strategy for row in read_sweep(sweep)} == set(STRATEGIES) - {"full", *EVICTING}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [{"name": "a", "strategy": "nope"}],
            "row 1: strategy: got 'nope', allowed: full, flat, attention_aware_graph",
        ),
        ([{"name": "a"}], "row 1: got {'name': 'a'}, allowed"),
        ([{"name": "a", "strategy": "flat", "top_k": 3}], "row 1: got"),
        ([{"name": "a", "strategy": "flat"}] * 2, "row 2: the name 'a' is there twice"),
        ([{"name": "a", "strategy": "flat"}, {"name": "b", "strategy": "flat"}], "b and a are the same settings"),
        ([{"name": "a", "strategy": "flat", "set": {f"{GRAPH}.topk": 3}}], f"a: {GRAPH}.topk: unknown key"),
        ([{"name": "a", "strategy": "flat", "set": {f"{GRAPH}.top_k": 0}}], f"a: {GRAPH}.top_k: got 0, allowed: >= 1"),
        ([], "got list, allowed: a list of rows"),
        ({}, "got dict, allowed: a list of rows"),
    ],
)
def test_bad_sweeps_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Any, told: str) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(rows))
    folder = write_trace(tmp_path / "a")
    words = ["--traces", str(folder), "--output", str(tmp_path / "o.json"), "--sweep", str(tmp_path / "sweep.json")]
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert told in error.replace("RetroInfer.", "")
    assert error.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "strategies: got none and no sweep"),
        (["--strategies", "flat,nope"], "strategies: strategy: got 'nope', allowed: full, flat"),
        (["--strategies", "flat", "--metrics", "recall,nope"], "metrics: got 'nope', allowed: recall, mass"),
        (["--strategies", "flat", "--layers", "1"], "layers: got [1], allowed for"),
        (["--strategies", "flat", "--device", "tpu"], "device: got 'tpu', allowed here: cpu"),
        (["--strategies", "flat", "--set", "top_k"], "set: got 'top_k', allowed: SECTION.KEY=VALUE"),
        (["--strategies", "flat", "--set", f"{GRAPH}.top_k=400"], f"{GRAPH}.top_k: got 400, allowed: 1 to 300"),
        (["--strategies", "flat", "--output", "nowhere/o.json"], "output: folder nowhere does not exist"),
    ],
)
def test_bad_arguments_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str, fills: list[str]
) -> None:
    folder = write_trace(tmp_path / "a")
    assert command.main(["--traces", str(folder), "--output", str(tmp_path / "o.json"), *words]) == 2
    error = capsys.readouterr().err
    assert told in error.replace("RetroInfer.", "")
    assert error.strip().count("\n") == 0
    assert fills == []


def test_a_results_file_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_trace(tmp_path / "a")
    for content, told in (("{}", "not a results file of benchmark.index"), ("{", "not JSON")):
        (tmp_path / "o.json").write_text(content)
        words = ["--traces", str(folder), "--output", str(tmp_path / "o.json"), "--strategies", "full"]
        assert command.main(words) == 2
        assert told in capsys.readouterr().err
    assert command.main(["--traces", str(folder), str(folder), "--output", str(tmp_path / "p.json"), *words[-2:]]) == 2
    assert "the same trace is given twice" in capsys.readouterr().err
