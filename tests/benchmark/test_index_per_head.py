"""Choices for each head: the arithmetic by hand, and what the command reads and refuses."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from index_cases import write_trace

from benchmark.index import __main__ as bench
from benchmark.index.per_head import Choices, compare, curve, keys_at, main

GRAPH = "attention_aware_graph"
# Two heads: 200 keys more win the first .2, the second .02.
RECALL, KEYS = np.array([[0.8, 0.9], [1.0, 0.92]]), np.array([[100.0, 100.0], [300.0, 300.0]])


def test_the_curve_of_two_heads_by_hand() -> None:
    recall, keys, picks = curve((RECALL, KEYS), (RECALL, KEYS))
    assert recall.tolist() == pytest.approx([0.85, 0.95, 0.96])
    assert keys.tolist() == [100, 200, 300]
    assert picks.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert keys_at(recall, keys, 0.9) == pytest.approx(150)
    assert keys_at(recall, keys, 0.84) is None
    assert keys_at(recall, keys, 0.97) is None


def test_the_choice_costs_no_more_than_any_other_of_its_recall() -> None:
    rng = np.random.default_rng(0)
    recall, keys = rng.random((3, 5)), rng.integers(10, 100, (3, 5)).astype(float)
    found = curve((recall, keys), (recall, keys))
    heads = np.arange(5)
    for rows in itertools.product(range(3), repeat=5):
        cost = keys_at(*found[:2], recall[list(rows), heads].mean())
        assert cost is None or cost <= keys[list(rows), heads].mean() + 1e-9


def test_what_each_uniform_choice_is_compared_with() -> None:
    """A third row between the two gives both heads .1 and .01 for 100 keys each."""
    recall, keys = np.vstack((RECALL, [[0.9, 0.91]])), np.vstack((KEYS, [[200.0, 200.0]]))
    mine = Choices("a", "", ("1", "3", "2"), recall, keys)
    rows = {row["value"]: row for row in compare(mine, [])}
    assert rows["1"]["afterwards_saves"] == rows["3"]["afterwards_saves"] == pytest.approx(0)
    # Mean recall .905 of the uniform 200 keys: .055 above the least, at 100 keys for .1.
    assert rows["2"]["afterwards_keys"] == pytest.approx(155)
    assert rows["2"]["afterwards_saves"] == pytest.approx(0.225)
    assert rows["2"]["from_others_keys"] is None
    assert rows["1"]["chosen"] == {"1": 2}


def test_a_choice_from_others_is_judged_by_this_trace() -> None:
    """The other trace's heads are the other way round, so that the keys go to the head that wins least."""
    mine = Choices("a", "", ("1", "3"), RECALL, KEYS)
    other = Choices("b", "", ("1", "3"), RECALL[:, ::-1], KEYS)
    recall, keys, _ = curve((other.recall, other.keys), (mine.recall, mine.keys))
    assert recall.tolist() == pytest.approx([0.85, 0.86, 0.96])
    assert keys.tolist() == [100, 200, 300]
    uniform = compare(mine, [other])[1]
    assert uniform["from_others_saves"] == pytest.approx(0)


def test_from_a_sweep_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_trace(tmp_path / name, n=900, tests=6) for name in ("a", "b")]
    rows = [
        {
            "name": f"{links} {beam}",
            "strategy": GRAPH,
            "set": {f"{GRAPH}.key_links": links, f"{GRAPH}.ef_search": beam, f"{GRAPH}.top_k": 10},
        }
        for links in (8, 24)
        for beam in (10, 20, 40)
    ]
    (tmp_path / "sweep.json").write_text(json.dumps(rows))
    words = ["--traces", *map(str, folders), "--sweep", str(tmp_path / "sweep.json"), "--metrics", "recall,bytes"]
    assert bench.main([*words, "--output", str(tmp_path / "results.json")]) == 0
    results, output = str(tmp_path / "results.json"), tmp_path / "o.json"
    assert main([results, "--knob", "ef_search", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert (written["results"], written["knobs"]) == (["results.json"], [f"{GRAPH}.ef_search"])
    assert [(group["trace"], group["with"]) for group in written["groups"]] == [
        (trace, {"key_links": links}) for links in (8, 24) for trace in ("a", "b")
    ]
    for group in written["groups"]:
        assert [row["value"] for row in group["rows"]] == ["10", "20", "40"]
        for row in group["rows"]:
            assert row["afterwards_keys"] <= row["uniform_keys"] + 1e-6
            assert sum(row["chosen"].values()) == 2 * 2 * 3
    assert main([results, "--knob", "ef_search", "--knob", "key_links", "--output", str(output)]) == 0
    assert len(json.loads(output.read_text())["groups"][0]["rows"]) == 6
    assert "| a |  | 10/8 |" in capsys.readouterr().out

    assert main([results, "--knob", "num_entries", "--output", str(output)]) == 2
    assert f"no two rows that differ in {GRAPH}.num_entries alone" in capsys.readouterr().err
