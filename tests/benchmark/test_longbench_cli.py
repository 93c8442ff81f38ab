"""LongBench's command lines: from flags to result files, with a stand-in for the model; bad flags get one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from longbench_samples import WordTokenizer, make_record, write_records

from benchmark.LongBench import evaluation, run, run_longbench
from benchmark.LongBench.methods import describe_budget, eviction_of_budget, strategy_of, top_k_of_budget
from benchmark.runner import Task, keep_protocol
from config import ESTIMATIONS, RETRIEVAL_STRATEGIES, RetroInferConfig

REPO = Path(__file__).parents[2]
SETTINGS = RetroInferConfig(retrieval_strategy="flat")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    pytest.importorskip("rouge")
    pytest.importorskip("jieba")
    pytest.importorskip("fuzzywuzzy")
    for dataset in ("hotpotqa", "trec", "lcc"):
        records = [make_record(dataset, number) for number in range(4)]
        write_records(tmp_path / "data" / f"{dataset}.jsonl", records)
        write_records(tmp_path / "data" / f"{dataset}_e.jsonl", records)
    return tmp_path / "data"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the runner was asked for. Full attention answers rightly, other strategies every second time."""
    calls: list[dict[str, Any]] = []

    def run_tasks(
        llm: Any,
        tokenizer: Any,
        tasks: list[Task],
        strategies: list[str],
        config: Any,
        folder: Path,
        protocol: Any,
        **_: Any,
    ) -> None:
        keep_protocol(folder, {**protocol, **config})
        calls.append({"tasks": tasks, "strategies": strategies, "config": config["RetroInfer"], "protocol": protocol})
        for strategy in strategies:
            (folder / strategy).mkdir(exist_ok=True)
            for task in tasks:
                lines = [
                    {
                        "id": sample.id,
                        "pred": sample.expected[0] if strategy == "full" or place % 2 else "",
                        "expected": sample.expected,
                        **sample.extra,
                    }
                    for place, sample in enumerate(task.samples)
                ]
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (folder / strategy / f"{task.name}.jsonl").write_text(text)

    def load_model(name: str, max_len: int | None, dtype: str, device: str, tokenizer: Any, lora: str | None) -> Any:
        return SimpleNamespace(spec=SimpleNamespace(window=4096), eos_ids={1}, max_length=max_len or 4096)

    monkeypatch.setattr(evaluation, "load_tokenizer", lambda name: WordTokenizer())
    monkeypatch.setattr(evaluation, "load_model", load_model)
    monkeypatch.setattr(evaluation, "run_tasks", run_tasks)
    return calls


def flags(data: Path, *more: str) -> list[str]:
    return ["--data_path", str(data), "--save_dir", str(data.parent / "out"), *more]


def test_a_run_writes_records_upstreams_files_and_a_summary(
    data: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = flags(data, "--datasets", "hotpotqa,trec", "--strategies", "full,flat", "--model", "owner/Tiny")
    assert run.main([*chosen, "--num_examples", "3"]) == 0
    out = data.parent / "out"
    assert [task.name for task in asked[0]["tasks"]] == ["hotpotqa", "trec"]
    assert [sample.id for sample in asked[0]["tasks"][0].samples] == ["hotpotqa-0", "hotpotqa-1", "hotpotqa-2"]
    assert asked[0]["strategies"] == ["full", "flat"]
    assert json.loads((out / "pred" / "Tiny" / "flat" / "result.json").read_text()) == {
        "hotpotqa": 33.33,
        "trec": 33.33,
    }
    assert len((out / "pred" / "Tiny" / "full" / "trec.jsonl").read_text().splitlines()) == 3
    summary = json.loads((out / "pred" / "Tiny" / "summary.json").read_text())
    stated = summary["config"]
    assert (stated["protocol"], stated["model"]) == ("official", "owner/Tiny")
    assert stated["samples"] == "3 of each dataset at most, the first"
    assert stated["truncation"] == "above 3500 tokens: first and last 1750 tokens, decoded, before the template"
    assert summary["strategies"]["full"]["averages"][1]["score"] == 100
    assert "lcc" in summary["strategies"]["full"]["averages"][1]["missing"]
    assert [row["dataset"] for row in summary["agreement"]] == ["hotpotqa", "trec", "mean of 2"]
    printed = capsys.readouterr().out
    assert "| hotpotqa | 3 (0) | 100.00 | 33.33 |" in printed
    assert "- template: the tokenizer's chat template" in printed
    assert "mean of the 16 English and code datasets is without narrativeqa, " in printed
    assert "repobench-p (full, flat)" in printed


def test_strategies_are_named_as_for_ruler(data: Path, asked: list[dict[str, Any]]) -> None:
    """Variants with estimations, budgets and scores, beside attention types."""
    names = "Full_Flash_Attn,full,streaming_llm@256,snapkv@512,circuitkv+null_query@512,flat+none,h2o"
    assert run.main(flags(data, "--datasets", "trec", "--strategies", names)) == 0
    assert asked[0]["strategies"] == names.split(",")[1:]
    folder = data.parent / "out" / "pred" / "SmolLM2-135M-Instruct"
    assert len((folder / "streaming_llm@256" / "trec.jsonl").read_text().splitlines()) == 4
    summary = json.loads((folder / "summary.json").read_text())
    assert {row["strategy"] for row in summary["agreement"]} == set(names.split(",")[2:])


def test_runs_of_one_protocol_add_up_and_another_one_is_refused(
    data: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(flags(data, "--category", "CC", "--datasets", "lcc", "--strategies", "full")) == 2
    assert "has no repobench-p.jsonl" in capsys.readouterr().err
    assert run.main(flags(data, "--datasets", "lcc", "--strategies", "full")) == 0
    assert run.main(flags(data, "--datasets", "trec", "--strategies", "flat")) == 0
    assert run.main(flags(data, "--datasets", "trec", "--strategies", "full")) == 0
    folder = data.parent / "out" / "pred" / "SmolLM2-135M-Instruct"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["strategies"]["full"]["scores"] == {"trec": 100, "lcc": 100}
    assert json.loads((folder / "full" / "result.json").read_text()) == {"trec": 100, "lcc": 100}
    assert [row["strategy"] for row in summary["agreement"]] == ["flat", "flat"]
    assert run.main(flags(data, "--datasets", "lcc", "--protocol", "retroinfer")) == 2
    assert "holds results of another protocol (" in capsys.readouterr().err


def test_the_e_variant(data: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(flags(data, "--e", "--datasets", "trec", "--strategies", "full")) == 0
    folder = data.parent / "out" / "pred_e" / "SmolLM2-135M-Instruct"
    assert '"8k+": NaN' in (folder / "full" / "result.json").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["strategies"]["full"]["scores"] == {"trec": {"0-4k": 100.0, "4-8k": None, "8k+": None}}
    assert summary["config"]["benchmark"] == "LongBench-E"
    assert "| trec | 4 (0) | 100.00 / - / - |" in capsys.readouterr().out


def test_lines_left_out_stay_in_the_summary(data: Path, asked: list[dict[str, Any]]) -> None:
    with open(data / "trec.jsonl", "a") as file:
        file.write("{\n")
    assert run.main(flags(data, "--datasets", "trec", "--strategies", "full")) == 2
    assert run.main(flags(data, "--datasets", "trec", "--strategies", "full", "--skip_bad")) == 0
    assert run.main(flags(data, "--datasets", "lcc", "--strategies", "full")) == 0
    summary = data.parent / "out" / "pred" / "SmolLM2-135M-Instruct" / "summary.json"
    assert [line["number"] for line in json.loads(summary.read_text())["lines_left_out"]["trec"]] == [5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--datasets", "squad"], "datasets: got squad; LongBench has narrativeqa"),
        (["--category", "QA"], "category: got 'QA'"),
        (["--strategies", "magic"], "strategy: got 'magic', allowed: full, flat"),
        (["--strategies", "flat@256"], "got 'flat@256', allowed: a budget of tokens behind streaming_llm, h2o"),
        (["--strategies", ","], "strategies: got none"),
        (["--num_examples", "0"], "num_examples: got 0, allowed: an integer >= 1"),
        (["--protocol", "retroinfer", "--max_length", "9", "--datasets", "trec"], "max_length: got 9, allowed: none"),
        (["--data_path", "nowhere"], "nowhere does not exist; expected a folder"),
    ],
)
def test_bad_flags_get_one_line(
    data: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert run.main(flags(data, *given)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not asked


def kvcache_factory(data: Path, method: str, *more: str) -> list[str]:
    return [*flags(data), "--model_path", "owner/Tiny", "--method", method, "--datasets", "hotpotqa,lcc", *more]


def test_called_as_kvcache_factorys_runner(
    data: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["--attn_implementation", "flash_attention_2", "--use_cache", "True", "--eval_batch_size", "1"]
    assert run_longbench.main(kvcache_factory(data, "FullKV", *usual)) == 0
    assert run_longbench.main(kvcache_factory(data, "flat", "--max_capacity_prompts", "512")) == 0
    folder = data.parent / "out" / "tiny_512"
    assert len((folder / "hotpotqa" / "FullKV.json").read_text().splitlines()) == 4
    assert json.loads((folder / "lcc" / "flat.json").read_text().splitlines()[0])["_id"] == "lcc-0"
    meta = json.loads((folder / "run_meta.json").read_text())
    assert set(meta) == {"FullKV", "flat"}
    assert set(meta["flat"]) == {"commit", "arguments", "versions", "time", "protocol"}
    assert meta["flat"]["arguments"]["max_capacity_prompts"] == 512
    assert "4 sinks, 64 window tokens and top_k 444" in meta["flat"]["protocol"]["budget"]
    assert asked[1]["config"]["attention_aware_graph"]["top_k"] == 444
    assert "- budget: 512 tokens of the prompt per query head" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["strategy"] for row in summary["agreement"]] == ["flat"] * 3


def test_the_wave_index_runs_without_a_budget_beside_full_attention(data: Path, asked: list[dict[str, Any]]) -> None:
    assert run_longbench.main(kvcache_factory(data, "wave_index", "--retrieval_budget", "0.03")) == 0
    assert run_longbench.main(kvcache_factory(data, "FullKV", "--budget", "-1", "--retrieval_budget", "0.03")) == 0
    folder = data.parent / "out" / "tiny_-1"
    meta = json.loads((folder / "run_meta.json").read_text())
    assert meta["wave_index"]["arguments"]["max_capacity_prompts"] == -1
    assert "wave index what retrieval_budget 0.03 and" in meta["wave_index"]["protocol"]["budget"]
    summary = json.loads((folder / "summary.json").read_text())
    assert {row["strategy"] for row in summary["agreement"]} == {"wave_index"}


@pytest.mark.parametrize("method", ["StreamingLLM", "H2O", "SnapKV", "PyramidKV", "circuitkv"])
@pytest.mark.parametrize("capacity", [64, 512])
def test_what_evicts_has_the_budget(data: Path, asked: list[dict[str, Any]], method: str, capacity: int) -> None:
    """Beside full attention, in one folder, which holds one configuration."""
    given = ["--max_capacity_prompts", str(capacity)]
    for name in ("FullKV", method):
        assert run_longbench.main(kvcache_factory(data, name, *given)) == 0
    assert asked[1]["strategies"] == [strategy_of(method)]
    eviction = asked[1]["config"]["eviction"]
    assert (eviction["budget"], eviction["budget_share"]) == (capacity, 0)
    assert f"{capacity} tokens of the prompt for each kv head" in asked[1]["protocol"]["budget"]
    assert (data.parent / "out" / f"tiny_{capacity}" / "lcc" / f"{method}.json").exists()


def test_what_evicts_has_the_default_budget_or_a_share(data: Path, asked: list[dict[str, Any]]) -> None:
    ratio = ["--max_capacity_prompts_ratio", "0.25"]
    assert run_longbench.main(kvcache_factory(data, "SnapKV")) == 0
    assert run_longbench.main(kvcache_factory(data, "SnapKV", *ratio)) == 0
    assert run_longbench.main(kvcache_factory(data, "FullKV", "--budget", "-1", *ratio)) == 0
    assert run_longbench.main(kvcache_factory(data, "SnapKV", "--budget", "128", *ratio)) == 0
    found = [(call["config"]["eviction"]["budget"], call["config"]["eviction"]["budget_share"]) for call in asked]
    assert [share for _, share in found] == [0, 0.25, 0.25, 0]
    assert (found[0][0], found[3][0]) == (512, 128)
    assert "0.25 of the tokens of the prompt for each kv head" in asked[1]["protocol"]["budget"]
    assert (data.parent / "out" / "tiny_0.25" / "lcc" / "SnapKV.json").exists()


def test_the_budget_holds_against_a_share_of_the_models_file() -> None:
    assert eviction_of_budget("snapkv", 64, 0.5) == {"eviction.budget": 64, "eviction.budget_share": 0}
    assert eviction_of_budget("flat", 64, -1) == eviction_of_budget("full", 64, -1) == eviction_of_budget("h2o", 64, -1)
    assert eviction_of_budget("full", -1, 2) == eviction_of_budget("wave_index", -1, -1) == {}


@pytest.mark.parametrize("estimation", ESTIMATIONS)
def test_a_budget_says_what_is_read_on_top(estimation: str) -> None:
    settings = RetroInferConfig(attention_aware_graph={"estimation": estimation, "estimation_budget": 0.5})
    told = describe_budget(1024, 956, settings)
    assert (estimation in told) == (estimation != "none")
    assert ("estimation_budget 0.5 of them are read on top" in told) == (estimation == "centroid")


def test_aliases_and_random_samples(data: Path, asked: list[dict[str, Any]]) -> None:
    given = ["--model", "x/Tiny", "--method", "attention-aware-graph", "--budget", "1024", "--dataset", "lcc"]
    drawn = ["--max_num_examples", "2", "--sample_method", "random", "--seed", "7"]
    assert run_longbench.main([*flags(data), *given, *drawn]) == 0
    assert asked[0]["strategies"] == ["attention_aware_graph"]
    assert asked[0]["protocol"]["samples"] == "2 of each dataset at most, drawn at random with seed 7"
    assert len(asked[0]["tasks"][0].samples) == 2
    assert (data.parent / "out" / "tiny_1024" / "lcc" / "attention-aware-graph.json").exists()


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("MagicKV", [], "method: got 'MagicKV'; known: FullKV, full, flat, attention_aware_graph"),
        ("ThinK", [], "method: got 'ThinK' (KVCache-Factory has it, this project does not); known: FullKV"),
        ("flat", ["--eval_batch_size", "2"], "eval_batch_size: got 2, allowed: 1"),
        ("flat", ["--budget", "68"], "max_capacity_prompts: got 68, allowed: above 68, the 4 sinks and 64 window"),
        ("flat", ["--budget", "-1", "--max_capacity_prompts_ratio", "0.1"], "max_capacity_prompts_ratio: got 0.1"),
        ("flat", ["--max_capacity_prompts_ratio", "0.1"], "max_capacity_prompts_ratio: got 0.1, allowed: -1, except"),
        ("SnapKV", ["--budget", "-1"], "max_capacity_prompts: got -1, allowed: 1 or more, or -1 beside a max_capacity"),
        ("SnapKV", ["--budget", "0"], "max_capacity_prompts: got 0, allowed: 1 or more"),
        ("SnapKV", ["--max_capacity_prompts_ratio", "1.5"], "_ratio: got 1.5, allowed: above 0, at most 1"),
        ("SnapKV", ["--top_k", "5"], "top_k: got 5, allowed: not given: snapkv has none"),
        (
            "SnapKV",
            ["--set", "RetroInfer.eviction.budget=5"],
            "RetroInfer.eviction.budget: got 5, but max_capacity_prompts sets it; allowed: one of them",
        ),
        (
            "h2o",
            ["--max_capacity_prompts_ratio", "0.1", "--set", "eviction.budget_share=0.2"],
            "eviction.budget_share: got 0.2, but max_capacity_prompts_ratio sets it; allowed: one of them",
        ),
        ("flat", ["--top_k", "5"], "top_k: got 5, but max_capacity_prompts 512 sets it"),
        ("ivf", ["--set", "ivf.top_k=5"], "ivf.top_k: got 5, but max_capacity_prompts 512 sets it; allowed: 0"),
        (
            "wave_index",
            ["--max_capacity_prompts", "1024"],
            "max_capacity_prompts: got 1024, allowed: -1 or not given: the budgets of wave_index are retrieval_budget",
        ),
        ("wave_index", ["--max_capacity_prompts_ratio", "0.1"], "max_capacity_prompts_ratio: got 0.1, allowed: -1 or"),
        ("wave_index", ["--top_k", "5"], "top_k: got 5, allowed: not given"),
        ("flat", ["--datasets", "squad"], "datasets: got squad"),
    ],
)
def test_bad_flags_of_kvcache_factorys_way(
    data: Path,
    asked: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    method: str,
    given: list[str],
    message: str,
) -> None:
    assert run_longbench.main(kvcache_factory(data, method, *given)) == 2
    assert message in capsys.readouterr().err
    assert not asked


def test_methods_and_budgets() -> None:
    assert strategy_of("FullKV") == strategy_of("fullkv") == "full"
    for strategy in RETRIEVAL_STRATEGIES:
        assert strategy_of(strategy) == strategy_of(strategy.upper().replace("_", "")) == strategy
    assert top_k_of_budget("flat", 1024, -1, SETTINGS) == 956
    assert top_k_of_budget("full", 1024, -1, SETTINGS) == 956
    assert top_k_of_budget("full", -1, 0.5, SETTINGS) is None


def test_the_runner_starts_as_a_file_from_the_repository() -> None:
    command = [sys.executable, "benchmark/LongBench/run_longbench.py", "--model", "x", "--method", "MagicKV"]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=REPO, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("run_longbench.py: error: method: got 'MagicKV'; known: FullKV, full")


def test_the_shell_script_passes_retroinfers_arguments_on(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(REPO / "benchmark" / "LongBench" / "longbench_run.sh")]
    six = ["llama-3.1-8b", "RetroInfer", "0.018", "0.232", "bf16", "SQA"]

    def passed(*given: str) -> list[str]:
        done = subprocess.run([*script, *six, *given], env=path, capture_output=True, text=True, check=True)
        return done.stdout.split("\n")[:-1]

    fixed = ["-m", "benchmark.LongBench.run", "--model", "llama-3.1-8b", "--strategies"]
    rest = ["--retrieval_budget", "0.018", "--estimation_budget", "0.232", "--dtype", "bf16", "--category", "SQA"]
    assert passed() == [*fixed, "RetroInfer", *rest]
    assert passed("flat", "--e") == [*fixed, "flat", *rest, "--e"]
    assert passed("--num_examples", "2") == [*fixed, "RetroInfer", *rest, "--num_examples", "2"]
    run.parse_args(passed("flat")[2:])
    short = subprocess.run([*script, "llama-3.1-8b"], capture_output=True, text=True, check=False)
    assert short.returncode == 2
    assert "MODEL ATTENTION_TYPE RETRIEVAL_BUDGET ESTIMATION_BUDGET DTYPE CATEGORY [STRATEGY]" in short.stderr
