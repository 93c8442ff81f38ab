"""The timing of the GPU's exact search: bad input is answered in one line, and a run's rows are whole."""

import json
from pathlib import Path

import pytest
import torch

from benchmark.index.gpu_knn_time import main, parse_args, run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lengths", "5x"], "lengths: got '5x'"),
        (["--k", "0"], "k: got 0"),
        (["--k", "200", "--lengths", "100,300"], "k: got 200, allowed: fewer than the 100 tokens"),
        (["--shape", "1,2"], "shape: got '1,2'"),
        (["--traces", "/nowhere"], "folder /nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--output", str(tmp_path / "out.json")]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_has_a_row_for_both_searches(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    words = ["--shape", "1,4,2,64", "--lengths", "700", "--k", "5", "--rounds", "1", "--output", str(output)]
    assert "causal" in run(parse_args(words))
    rows = json.loads(output.read_text())["rows"]
    assert [row["search"] for row in rows] == ["causal", "key"]
    assert all(row["failed"] < 0.1 and row["candidates"] >= 5 for row in rows)
