"""The runner: one prefill serves all strategies, a kill loses and doubles nothing, shards merge to the same files."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import runner_job
import torch
from runner_job import STRATEGIES, load, run, tasks

from benchmark import runner
from benchmark.launcher import Shard
from benchmark.runner import Sample, Task, read_records, run_tasks, until_stop, write_results
from config import generate_config
from model_hub import LLM


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runner_job.tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return load(tiny_model)


def final_files(folder: Path) -> dict[str, bytes]:
    names = [f"{strategy}/{task}.jsonl" for strategy in STRATEGIES for task in ("one", "two")]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def undisturbed(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(llm, folder)
    return final_files(folder)


def test_records_scores_and_costs(llm: LLM, tmp_path: Path) -> None:
    run(llm, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "flat" / "one.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["0", "1", "2", "3", "4"]
    assert all(record["kind"] == "a" and record["new_tokens"] == 4 for record in records)
    assert all(0 < record["attended_share"] < 1 and record["kv_bytes"] > 0 for record in records)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["results"]["flat"]["one"]["score"] == 100
    assert results["results"]["full"]["two"]["attended_share"] == 1
    assert results["config"]["seed"] == 1
    timing = [json.loads(line) for line in (tmp_path / "full" / "one.timing.jsonl").read_text().splitlines()]
    assert all(line["prefill_seconds"] > 0 for line in timing)


def test_strategies_share_a_prefill_and_answer_as_they_do_alone(llm: LLM, undisturbed: dict[str, bytes]) -> None:
    config = generate_config("tiny", 300, "RetroInfer", overrides={"attention_aware_graph.top_k": 20})
    for strategy in STRATEGIES:
        records = [json.loads(line) for line in undisturbed[f"{strategy}/one.jsonl"].splitlines()]
        for sample, record in zip(tasks()[0].samples, records, strict=True):
            ids = torch.tensor([list(sample.prompt.encode())])
            alone = llm.generate(strategy, ids, None, 4, config)[0]
            assert record["pred"] == " ".join(map(str, alone))


def test_batches_of_equal_length_answer_alike(llm: LLM, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    run(llm, tmp_path, batch_size=3)
    files = final_files(tmp_path)
    for name, content in undisturbed.items():
        preds, batched = ([json.loads(line)["pred"] for line in text.splitlines()] for text in (content, files[name]))
        assert preds == batched


def test_a_finished_run_is_not_run_again(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(llm, tmp_path)
    before = final_files(tmp_path)
    monkeypatch.setattr(llm, "prefill", lambda *a, **k: pytest.fail("a finished sample was run again"))
    run(llm, tmp_path)
    assert final_files(tmp_path) == before


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_half_written_line_is_run_again(llm: LLM, tmp_path: Path, undisturbed: dict[str, bytes], cut: int) -> None:
    run(llm, tmp_path)
    part = tmp_path / "parts" / "flat" / "one.0.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
    (tmp_path / "flat" / "one.jsonl").unlink()
    run(llm, tmp_path)
    assert final_files(tmp_path) == undisturbed


def test_killed_at_any_point_and_started_again(
    tmp_path: Path, tiny_model: Path, llm: LLM, undisturbed: dict[str, bytes]
) -> None:
    for samples_done in (1, 4):
        job = [sys.executable, str(Path(runner_job.__file__)), str(tiny_model), str(tmp_path), str(samples_done)]
        assert subprocess.run(job, check=False, cwd=Path(runner_job.__file__).parents[2]).returncode == -signal.SIGKILL
    run(llm, tmp_path)
    assert final_files(tmp_path) == undisturbed


def test_shards_of_several_processes_merge_to_the_same_files(
    llm: LLM, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    for rank in (1, 0, 2):
        run(llm, tmp_path, shard=Shard(rank, 3))
    assert final_files(tmp_path) == undisturbed


def test_processes_of_torchrun_share_the_samples(
    tmp_path: Path, tiny_model: Path, undisturbed: dict[str, bytes]
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = [str(Path(runner_job.__file__)), str(tiny_model), str(tmp_path), "0"]
    subprocess.run([*launch, *job], check=True, cwd=Path(runner_job.__file__).parents[2], capture_output=True)
    assert final_files(tmp_path) == undisturbed
    assert sorted(path.name for path in tmp_path.glob("parts/full/*.jsonl")) == [
        "one.0.jsonl",
        "one.1.jsonl",
        "two.0.jsonl",
        "two.1.jsonl",
    ]


def test_variants_that_share_a_build_answer_as_in_runs_of_their_own(llm: LLM, tmp_path: Path) -> None:
    names = ["flat+none", "flat+centroid", "attention_aware_graph+centroid", "attention_aware_graph+softmax_lift"]
    config = generate_config("tiny", 300, "RetroInfer", overrides={"attention_aware_graph.top_k": 20})
    run_tasks(llm, runner_job.Bytes(), tasks(), names, config, tmp_path / "all", {"seed": 1})
    for name in names:
        run_tasks(llm, runner_job.Bytes(), tasks(), [name], config, tmp_path / "one", {"seed": 1})
        assert read_records(tmp_path / "one", name, "one") == read_records(tmp_path / "all", name, "one")
    estimated = {name: (read_records(tmp_path / "all", name, "one") or [{}])[0]["index_bytes"] for name in names}
    assert estimated["flat+none"] == 0 < estimated["flat+centroid"]


def test_the_launcher_states_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Shard.of_launcher() == Shard(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Shard.of_launcher() == Shard(2, 4)
    shares = [Shard(rank, 4).share("abcdef", before=3) for rank in range(4)]
    assert shares == [["b", "f"], ["c"], ["d"], ["a", "e"]]


def test_stop_tokens_end_the_answer_but_not_before_the_least_length(llm: LLM, tmp_path: Path) -> None:
    prompt = "y" * 160
    first = llm.generate("full", torch.tensor([list(prompt.encode())]), None, 1, generate_config("t", 160, "full"))[0]
    samples = [
        Sample("stopped", prompt, [], 4, stop_ids=frozenset(first)),
        Sample("forced", prompt, [], 4, stop_ids=frozenset(first), min_new_tokens=1),
    ]
    run(llm, tmp_path, tasks=[Task("stop", samples, lambda records: [0.0] * len(records))])
    stopped, forced = (json.loads(line) for line in (tmp_path / "full" / "stop.jsonl").read_text().splitlines())
    assert (stopped["pred"], stopped["new_tokens"]) == ("", 0)
    assert forced["new_tokens"] >= 1
    assert until_stop([5, 6, 7], frozenset({6})) == [5]


def test_line_separators_in_an_answer_do_not_break_its_line(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_job.Bytes, "decode", lambda self, tokens, skip_special_tokens: "a\u2028b\x85c\nd")
    run(llm, tmp_path)
    run(llm, tmp_path)
    assert {record["pred"] for record in read_records(tmp_path, "full", "one") or []} == {"a\u2028b\x85c\nd"}


def test_results_of_earlier_runs_of_other_tasks_stay(llm: LLM, tmp_path: Path) -> None:
    one, two = tasks()
    run(llm, tmp_path, tasks=[one])
    run(llm, tmp_path, tasks=[two])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {strategy: set(results[strategy]) for strategy in STRATEGIES} == {
        name: {"one", "two"} for name in STRATEGIES
    }


def test_processes_that_end_together_lose_no_results(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(llm, tmp_path)
    (tmp_path / "results.json").unlink()

    def slow() -> dict[str, Any]:
        """Stands between reading and writing."""
        time.sleep(0.2)
        return {}

    monkeypatch.setattr(runner, "environment", slow)
    ends = [threading.Thread(target=run, args=(llm, tmp_path), kwargs={"tasks": [task]}) for task in tasks()]
    for thread in ends:
        thread.start()
    for thread in ends:
        thread.join()
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {name: set(results[name]) for name in STRATEGIES} == {name: {"one", "two"} for name in STRATEGIES}


def test_means_are_of_what_all_records_state(llm: LLM, tmp_path: Path) -> None:
    run(llm, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results["full"]["one"]["estimated_share"] == 0 < results["flat"]["one"]["estimated_share"]
    path = tmp_path / "flat" / "one.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    del records[0]["estimated_share"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_results(tmp_path, tasks(), STRATEGIES)
    (old, new) = (json.loads((tmp_path / "results.json").read_text())["results"][s]["one"] for s in ("flat", "full"))
    assert "estimated_share" not in old
    assert "estimated_share" in new


def test_another_protocol_is_refused(llm: LLM, tmp_path: Path) -> None:
    run(llm, tmp_path)
    with pytest.raises(ValueError, match=r"another protocol \(diagnose: False there, True now\)"):
        run(llm, tmp_path, diagnose=True)


def test_a_damaged_line_is_named(llm: LLM, tmp_path: Path) -> None:
    run(llm, tmp_path)
    part = tmp_path / "parts" / "full" / "one.0.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    part.write_text(lines[0] + "{broken\n" + lines[1])
    with pytest.raises(ValueError, match=r"one\.0\.jsonl, line 2: not a finished sample"):
        run(llm, tmp_path)


def test_names_must_differ(llm: LLM, tmp_path: Path) -> None:
    doubled = [*tasks(), tasks()[0]]
    with pytest.raises(ValueError, match="tasks: got one more than once"):
        run(llm, tmp_path, tasks=doubled)
