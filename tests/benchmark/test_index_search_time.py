"""The search timer: what it counts, and what it refuses before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from index_cases import write_trace

from benchmark.index.hnswlib_index import is_installed
from benchmark.index.joined import join_heads, join_traces
from benchmark.index.search_time import main
from benchmark.index.traces import open_folder


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_row_for_every_index_and_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_trace(tmp_path / "a", n=300, dim=16, group=3)
    words = ["--traces", str(folder), "--strategies", "flat,attention_aware_graph,hnsw", "--top_k", "20"]
    assert main([*words, "--rounds", "2", "--dtype", "fp32", "--output", str(tmp_path / "o.json")]) == 0
    written = json.loads((tmp_path / "o.json").read_text())
    assert [(row["layer"], row["strategy"]) for row in written["rows"]] == [
        (layer, name) for layer in (0, 2) for name in ("flat", "attention_aware_graph", "hnsw")
    ]
    for row in written["rows"]:
        assert row["ns_per_key"] * row["keys_scored"] == pytest.approx(row["us_per_query"] * 1e3)
        assert 0 < row["recall"] <= 1
        if row["strategy"] == "flat":
            assert (row["keys_scored"], row["recall"]) == (300 - 68, 1)
    assert written["config"]["threads"] == 1
    assert "| a | 0 | 16 | flat | 232 | 1.000 |" in capsys.readouterr().out


@pytest.mark.skipif(not is_installed(), reason="needs hnswlib")
def test_hnswlib_is_timed_without_a_count_of_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_trace(tmp_path / "a", n=300, dim=16, group=3)
    words = ["--traces", str(folder), "--strategies", "hnswlib", "--top_k", "20", "--layers", "0", "--rounds", "1"]
    assert main([*words, "--output", str(tmp_path / "o.json")]) == 0
    row = json.loads((tmp_path / "o.json").read_text())["rows"][0]
    assert (row["keys_scored"], row["ns_per_key"]) == (None, None)
    assert row["recall"] > 0.5
    assert row["us_per_query"] > 0
    assert "| a | 0 | 16 | hnswlib | - |" in capsys.readouterr().out


def test_traces_and_heads_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        write_trace(tmp_path / name, n=n, dim=16, group=2, kv_heads=3, tests=t)
        for name, n, t in (("a", 200, 3), ("b", 150, 5))
    ]
    words = ["--traces", *map(str, folders), "--strategies", "flat", "--top_k", "20", "--rounds", "1", "--layers", "2"]
    assert main([*words, "--join_traces", "--join_heads", "--output", str(tmp_path / "o.json")]) == 0
    written = json.loads((tmp_path / "o.json").read_text())
    assert (written["config"]["join_traces"], written["config"]["join_heads"]) == (True, True)
    (row,) = written["rows"]
    assert (row["trace"], row["tokens"], row["kv_heads"], row["heads_joined"]) == ("a + b", 200 + 146, 1, 2)
    assert (row["head_dim"], row["keys_scored"], row["recall"]) == (32, 200 + 146 - 68, 1)
    capsys.readouterr()


def test_joined_states_are_those_of_the_parts(tmp_path: Path) -> None:
    a, b = (
        open_folder(write_trace(tmp_path / name, n=n, dim=16, group=2, kv_heads=3, tests=t)).load(2)
        for name, n, t in (("a", 200, 3), ("b", 150, 5))
    )
    both = join_traces([a, b])
    assert torch.equal(both.keys, torch.cat((a.keys, b.keys[:, 4:]), 1))
    assert torch.equal(both.queries[:, :, 200:], b.queries[:, :, 4:]), "query i stands at token i"
    assert torch.equal(both.tests, torch.cat((a.tests, b.tests), 2))
    wide = join_heads(a)
    assert wide.queries.shape == (1, 2, 200, 32)
    for part in ("queries", "keys", "values", "tests"):
        assert torch.equal(getattr(wide, part)[0], torch.cat((getattr(a, part)[0], getattr(a, part)[1]), -1))


@pytest.mark.parametrize(
    ("other", "words", "message"),
    [
        ({"dim": 32, "group": 1}, [], "join_traces: got [kv heads, g, d] of [(1, 1, 16), (1, 1, 32)]"),
        ({"dim": 16, "group": 1, "layers": (0, 3)}, [], "has layers [0, 3], allowed: those of"),
        ({"dim": 16, "group": 1}, ["--join_heads"], "join_heads: got a trace of 1 kv head, allowed: 2 or more"),
    ],
)
def test_what_cannot_be_joined(
    other: dict[str, Any], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        write_trace(tmp_path / "a", n=100, dim=16, group=1, kv_heads=1),
        write_trace(tmp_path / "b", n=100, kv_heads=1, **other),
    ]
    words = ["--traces", *map(str, folders), "--join_traces", *words]
    assert main([*words, "--output", str(tmp_path / "o.json")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strategies", "flat,annoy"], "strategies: got annoy, allowed here: attention_aware_graph, flat, ivf, hnsw"),
        (["--rounds", "0"], "rounds: got 0, allowed: >= 1"),
        (["--layers", "1-0"], "layers: got '1-0', allowed: numbers and ranges"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    folder = write_trace(tmp_path / "a", n=100, dim=16, group=1)
    assert main(["--traces", str(folder), *words, "--output", str(tmp_path / "o.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()


def test_a_trace_without_tokens_to_index_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_trace(tmp_path / "a", n=68, dim=16, group=1)
    assert main(["--traces", str(folder), "--output", str(tmp_path / "o.json")]) == 2
    assert "has 68 tokens, allowed: more than 68" in capsys.readouterr().err
