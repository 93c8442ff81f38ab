"""The main job on the default model: right answers through every strategy, honest records, clear errors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import simple_test
from benchmark.measure import measure
from benchmark.needle import needle_prompt
from cache_hub import memory
from config import EVICTING, RETRIEVAL_STRATEGIES, RetroInferConfig, generate_config

RECORD = {
    "answer", "correct", "prefill_seconds", "build_seconds", "ms_per_token", "attended_share", "scored_share", "recall",
    "mass", "index_bytes", "kv_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def needle(smollm2: Any) -> Any:
    return needle_prompt(smollm2[1], 1500, 0.4)


@pytest.fixture(scope="module")
def results(smollm2: Any, needle: Any) -> dict[str, dict[str, Any]]:
    """Every strategy's record of the same question, compared with an exact scan."""
    llm, tokenizer = smollm2
    return {
        strategy: measure(
            llm,
            tokenizer,
            [needle.text],
            [needle.answer],
            strategy,
            generate_config("SmolLM2-135M-Instruct", 1500, strategy),
            max_new_length=8,
            ignore_eos=False,
            diagnose=True,
        )
        for strategy in RETRIEVAL_STRATEGIES
    }


@pytest.mark.parametrize("strategy", RETRIEVAL_STRATEGIES)
def test_the_needle_is_found(results: dict[str, dict[str, Any]], strategy: str) -> None:
    result = results[strategy]
    assert result["correct"], result["answer"]
    assert result.keys() >= RECORD
    if strategy == "full":
        assert (result["attended_share"], result["scored_share"], result["index_bytes"]) == (1, 0, 0)
    else:
        assert result["attended_share"] < (0.7 if strategy in EVICTING else 0.3), "1,024 of 1,500 tokens are kept"


def test_the_graph_finds_what_an_exact_scan_finds(results: dict[str, dict[str, Any]]) -> None:
    result = results["attention_aware_graph"]
    assert result["recall"] > 0.97
    assert result["mass_of_exact"] > 0.99
    assert 0 < result["build_seconds"] >= sum(result["build_seconds_by_stage"].values()) * 0.99
    assert result["index_bytes"] < result["kv_bytes"]


def test_flat_is_its_own_oracle(results: dict[str, dict[str, Any]]) -> None:
    result = results["flat"]
    assert result["recall"] == 1
    assert result["mass_of_exact"] == pytest.approx(1)
    assert 0.5 < result["mass"] < 1


@pytest.mark.parametrize("strategy", ["flat", "attention_aware_graph", "ivf"])
def test_retrieving_all_indexed_keys_equals_full_attention(smollm2: Any, needle: Any, strategy: str) -> None:
    """Logits of six forced steps of the real model; nothing is lost on the way from index to answer."""
    llm, tokenizer = smollm2
    ids = tokenizer(needle.text, return_tensors="pt", add_special_tokens=False).input_ids
    count = ids.shape[1]
    graph, lists = {"top_k": count, "ef_search": count, "index_dtype": "auto"}, {"n_probe": count}
    settings = RetroInferConfig(retrieval_strategy=strategy, attention_aware_graph=graph, ivf=lists)
    forced = tokenizer(" 1234567", add_special_tokens=False).input_ids
    logits = {}
    for name in ("full", strategy):
        cache = llm.init_cache(name, settings, [ids.shape[1]], len(forced))
        steps = [llm.prefill(ids, None, cache)]
        steps += [llm.decode_step(torch.tensor([token]), cache) for token in forced[:-1]]
        logits[name] = torch.stack(steps)
        if name != "full":
            assert cache.stats.attended_share == 1
    error = (logits[strategy] - logits["full"]).norm() / logits["full"].norm()
    assert error < 1e-5


def test_main_prints_both_answers_and_writes_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    argv = ["simple_test.py", "--context_len", "600", "--gen_len", "8", "--batch_size", "2", "--output", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    assert simple_test.main() == 0
    printed = capsys.readouterr().out
    assert re.search(r"full +attention_aware_graph", printed)
    assert re.search(r"right +yes +yes", printed)
    written = json.loads(out.read_text())
    assert written.keys() == {"config", "environment", "results"}
    assert written["config"]["RetroInfer"]["retrieval_strategy"] == "auto"
    assert list(written["results"]) == ["full", "attention_aware_graph"]
    assert all(result.keys() >= RECORD for result in written["results"].values())
    assert all(len(result["answer"]) == 2 for result in written["results"].values())


def test_results_are_printed_where_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = {"results": {}, "config": {}, "environment": {"cpu": "none"}}
    monkeypatch.setattr(simple_test, "run", lambda args: outcome)

    def no_space(path: str, record: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(simple_test, "write_json", no_space)
    monkeypatch.setattr("sys.argv", ["simple_test.py", "--output", str(tmp_path / "out.json")])
    assert simple_test.main() == 1
    captured = capsys.readouterr()
    assert json.dumps(outcome) in captured.out
    assert "No space left on device" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--key_degree", "0"], "key_degree: got 0, allowed: >= 2"),
        (["--q_knn", "1"], "q_knn: got 1, allowed: >= 2"),
        (["--top_k", "5000"], "top_k: got 5000, allowed: 1 to 4096"),
        (["--retrieval_budget", "-1"], "retrieval_budget: got -1.0, allowed: 0 to 1"),
        (["--retrieval_strategy", "annoy"], "retrieval_strategy: got 'annoy', allowed: 'full', 'flat', 'attention"),
        (["--set", "attention_aware_graph.degree=3"], "degree: unknown key, got 3"),
        (["--attn_type", "Flash"], "attn_type: got 'Flash', allowed: Full_Flash_Attn, RetroInfer"),
        (["--context_len", "65600"], "65536"),
        (["--context_len", "0"], "context_len: got"),
        (["--context_len", "30"], "the question alone exceeds"),
        (["--gen_len", "0"], "gen_len"),
        (["--model", "./no/such/folder"], "does not exist"),
        (["--lora", "no-such-adapter"], "no adapter_config.json"),
        (["--data_path", "no-such-file.json"], "No such file"),
        (["--output", "no/such/folder/out.json"], "folder no/such/folder does not exist"),
    ],
)
def test_bad_input_is_one_clear_line_before_the_model_loads(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["simple_test.py", *argv])
    if "65600" not in argv:
        monkeypatch.setattr(simple_test, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    if "--lora" in argv:
        monkeypatch.undo()
        monkeypatch.setattr("sys.argv", ["simple_test.py", "--context_len", "300", *argv])
    assert simple_test.main() == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("simple_test.py: error: ")
    assert message in error


def test_too_little_memory_is_one_clear_line_before_any_strategy_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, smollm2: Any
) -> None:
    """Full attention would fit 43 MB, the graph would not."""
    monkeypatch.setattr("sys.argv", ["simple_test.py", "--context_len", "600"])
    monkeypatch.setattr(simple_test, "load_model", lambda *a, **k: smollm2[0])
    monkeypatch.setattr(simple_test, "measure", lambda *a, **k: pytest.fail("a strategy ran"))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 43e6)
    assert simple_test.main() == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"simple_test.py: error: attention_aware_graph with a prompt of 584 tokens and 16 new ones", error)
    assert re.search(r"43.0 MB are available; the largest context that fits is a prompt of \d+ tokens$", error)


@pytest.mark.parametrize("content", ["{", "[1]", '[{"input": "a"}]', '[{"input": "a", "outputs": []}]'])
def test_a_broken_data_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"data_path: .* is not a JSON list"):
        simple_test.read_prompts(str(path))


@pytest.mark.parametrize("content", ["[]", '[{"input": "", "outputs": "b"}]'])
def test_an_empty_prompt_is_refused(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    monkeypatch.setattr(simple_test, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="allowed: at least one prompt, none empty"):
        simple_test.run(simple_test.parse_args(["--data_path", str(path)]))


def test_prompts_from_a_data_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"input": "a", "outputs": "b"}, {"input": "c", "outputs": ["d", "e"]}]')
    assert simple_test.read_prompts(str(path)) == (["a", "c"], ["b", "d"])
