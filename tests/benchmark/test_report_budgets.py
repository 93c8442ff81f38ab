"""The table of methods that keep a budget: what stands where, paired differences, and what is refused."""

import json
from pathlib import Path

import pytest

from benchmark.report.budgets import main, parse_args, run


def write(folder: Path, scores: dict[str, list[float]], length: int | None = 4096) -> Path:
    """A results folder of one task."""
    results = {
        name: {"one": {"score": sum(each) / len(each), "samples": len(each), "scores": each, "attended_share": 0.125}}
        for name, each in scores.items()
    }
    config = {"benchmark": "RULER" if length else "other", "model": "tiny", "RetroInfer": {}}
    config |= {"length": length} if length else {}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"config": config, "environment": {}, "results": results}))
    return folder


def test_lines_are_methods_and_columns_budgets(tmp_path: Path) -> None:
    scores = {
        "full": [100.0] * 4,
        "snapkv@512": [50.0, 60.0, 70.0, 80.0],
        "snapkv@128": [10.0] * 4,
        "h2o@512": [40.0, 50.0, 60.0, 70.0],
        "circuitkv+query@512": [50.0, 70.0, 60.0, 80.0],
        "flat+none": [90.0] * 4,
    }
    lines = run(parse_args([str(write(tmp_path / "a", scores))])).splitlines()
    assert lines[0] == "| RULER, mean of 1 task, 4,096 tokens | 128 | 512 |"
    assert lines[2] == "| snapkv | 10.0 | 65.0 |"
    assert lines[3] == "| h2o | - | 55.0 (**-10.0 [-10.0, -10.0]**) |"
    assert lines[4].startswith("| circuitkv+query | - | 65.0 (+0.0 [-")
    assert lines[5] == "| full (512 tokens attended) | 100.0 [100.0, 100.0] | |"
    assert lines[6].startswith("| flat+none (512 tokens attended) | 90.0 ")


def test_folders_have_a_table_each_and_the_reference_may_be_another(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"h2o@64": [10.0, 20.0], "snapkv@64": [30.0, 40.0]})
    second = write(tmp_path / "b", {"h2o@64": [50.0, 50.0], "snapkv@64": [50.0, 50.0]}, None)
    told = run(parse_args([str(first), str(second), "--against", "h2o"])).split("\n\n")
    assert "| snapkv | 35.0 (**+20.0 [+20.0, +20.0]**) |" in told[0]
    assert "| snapkv | 50.0 (+0.0 [+0.0, +0.0]) |" in told[1]


def test_a_mean_over_fewer_tasks_is_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"snapkv@64": [30.0, 40.0], "h2o@64": [10.0, 20.0]})
    content = json.loads((folder / "results.json").read_text())
    content["results"]["snapkv@64"]["two"] = content["results"]["snapkv@64"]["one"]
    (folder / "results.json").write_text(json.dumps(content))
    lines = run(parse_args([str(folder)])).splitlines()
    assert lines[0].startswith("| RULER, mean of 2 tasks")
    assert lines[2:] == ["| snapkv | 35.0 |", "| h2o | - |"]


def test_a_method_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "a", {"h2o@64": [10.0], "full": [20.0]})
    assert main([str(folder)]) == 2
    assert "against: got 'snapkv', allowed: h2o" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
