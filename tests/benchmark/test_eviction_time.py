"""The timing of scores: a row for every length, whole; a second call goes on; bad input is answered in one line."""

import json
from pathlib import Path

import pytest

from benchmark.eviction_time import main, parse_args, run

SMALL = ["--shape", "1,4,2,16", "--dense", "32,48", "--rounds", "2", "--device", "cpu"]


def test_a_row_for_every_length(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    words = [*SMALL, "--methods", "snapkv,circuitkv+query,circuitkv+hub/window", "--output", str(output)]
    run(parse_args([*words, "--lengths", "100"]))
    first = json.loads(output.read_text())["rows"]
    told = run(parse_args([*words, "--lengths", "100,201"]))
    rows = json.loads(output.read_text())["rows"]
    assert rows[:1] == first
    assert [row["tokens"] for row in rows] == [100, 201]
    names = ["layer", "attention", "log-sum-exp", "solve", "torch", "snapkv", "circuitkv+query", "circuitkv+hub/window"]
    for row in rows:
        assert list(row["ms"]) == names
        assert all(len(times) == 2 and min(times) > 0 for times in row["ms"].values())
        operations = row["roofline_ms"] * row["product_tflops"] * 1e9
        assert operations == pytest.approx(2 * row["tokens"] ** 2 * 16 * 4)
    assert "| 201 tokens |" in told
    assert told.count("| roofline |") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lengths", "5x"], "lengths: got '5x'"),
        (["--lengths", "12"], "lengths: got 12, allowed: more than 12"),
        (["--rounds", "0"], "rounds: got 0"),
        (["--dense", "5"], "dense: got '5'"),
        (["--shape", "1,2"], "shape: got '1,2'"),
        (["--methods", "flat"], "methods: got 'flat'"),
        (["--methods", "snapkv/window"], "methods: got 'snapkv/window'"),
        (["--methods", "circuitkv+walk"], "circuitkv+walk"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *words, "--output", str(tmp_path / "out.json")]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
