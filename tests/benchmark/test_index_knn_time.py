"""The timer of the exact neighbour search: what it tells, and what it refuses before any work."""

import json
from pathlib import Path

import pytest
import torch
from index_cases import write_trace

from benchmark.index.knn_time import difference, main


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_row_for_both_searches_of_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_trace(tmp_path / "a", n=300, dim=16, group=3)
    words = ["--traces", str(folder), "--k", "20", "--rounds", "2", "--output", str(tmp_path / "o.json")]
    assert main(words) == 0
    written = json.loads((tmp_path / "o.json").read_text())
    assert [(row["layer"], row["search"]) for row in written["rows"]] == [
        (layer, search) for layer in (0, 2) for search in ("causal", "key")
    ]
    for row in written["rows"]:
        assert [len(row["seconds"][backend]) for backend in ("faiss", "native", "torch")] == [2, 2, 2]
        assert row["ratio"]["faiss"] == row["agreement"]["faiss"] == 1
        assert all(gap < 1e-6 for gap in row["largest_gap"].values())
        assert 15 < row["candidates"] < 300
    assert written["config"]["k"] == 20
    assert "| a | 0 | causal | faiss | " in capsys.readouterr().out


def test_lists_are_compared_by_ids_and_by_scores() -> None:
    keys = torch.tensor([[4.0, 0.0], [3.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
    queries = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    lists = torch.tensor([[0, 1], [0, -1]], dtype=torch.int32)
    assert difference(lists, lists.flip(1), keys, queries) == (1, 0)
    assert difference(lists, torch.tensor([[0, 2], [0, -1]], dtype=torch.int32), keys, queries) == (0.75, 0)
    assert difference(lists, torch.tensor([[0, 3], [0, -1]], dtype=torch.int32), keys, queries) == (0.75, 0.5)
    assert difference(lists, torch.tensor([[0, 1], [0, 1]], dtype=torch.int32), keys, queries) == (0, float("inf"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backends", "faiss,annoy"], "knn_backend: got 'annoy', allowed: 'auto', 'native', 'faiss'"),
        (["--backends", "triton"], "knn_backend: got 'triton' for states on cpu, allowed there"),
        (["--rounds", "0"], "rounds: got 0, allowed: >= 1"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    folder = write_trace(tmp_path / "a", n=100, dim=16, group=1)
    assert main(["--traces", str(folder), *words, "--output", str(tmp_path / "o.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()
