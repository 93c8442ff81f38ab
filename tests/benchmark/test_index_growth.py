"""The growth benchmark: what it compares, and what it refuses before any work."""

import json
from pathlib import Path

import pytest
import torch
from index_cases import write_trace

from benchmark.index.growth import main


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("strategy", ["attention_aware_graph", "flat"])
def test_a_row_for_each_way_to_have_the_index(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_trace(tmp_path / "a", n=300, dim=16, group=3)
    words = ["--traces", str(folder), "--strategy", strategy, "--prompt", "150", "--generated", "130", "--batch", "50"]
    assert main([*words, "--tests", "20", "--top_k", "10", "--output", str(tmp_path / "o.json")]) == 0
    written = json.loads((tmp_path / "o.json").read_text())
    names = ("built at once", "grown", "grown without queries")
    assert [(row["layer"], row["index"]) for row in written["rows"]] == [(at, name) for at in (0, 2) for name in names]
    for row in written["rows"]:
        assert 0.9 < row["worst_head"] <= row["recall"] <= 1, "a beam of 160 over 212 keys"
        assert row["keys_scored"] <= 280 - 68
        assert strategy != "flat" or (row["keys_scored"], row["recall"]) == (280 - 68, 1)
    assert written["config"]["batch"] == 50
    assert "| mean | all | grown |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "68"], "prompt: got 68, allowed: more than 68"),
        (["--batch", "0"], "batch: got 0, allowed: >= 1"),
        (["--prompt", "70", "--generated", "20", "--tests", "11"], "has 100 tokens, allowed: at least 101"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    folder = write_trace(tmp_path / "a", n=100, dim=16, group=1)
    assert main(["--traces", str(folder), *words, "--output", str(tmp_path / "o.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()
