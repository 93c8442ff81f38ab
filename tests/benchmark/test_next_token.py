"""Agreement with full attention's own next tokens."""

from pathlib import Path
from typing import Any

import pytest
import runner_job
import torch

from benchmark import next_token
from benchmark.next_token import compare, main, prompt_ids, table
from config import RetroInferConfig
from model_hub import LLM


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return runner_job.load(runner_job.tiny_model(tmp_path_factory.mktemp("model")))


def test_what_retrieves_everything_agrees_and_little_does_less(llm: LLM) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, llm.spec.vocab_size, (1, 300))
    everything = RetroInferConfig(attention_aware_graph={"top_k": 300, "estimation": "none"})
    little = RetroInferConfig(attention_aware_graph={"top_k": 1, "estimation": "none"}, static_pattern_end=1)
    all_ = compare(llm, ids, ["full", "flat"], everything, 20)
    few = compare(llm, ids, ["full", "flat"], little, 20)
    assert all_["full"]["agreement"] == all_["flat"]["agreement"] == 1
    assert abs(all_["flat"]["kl_nats"]) < 1e-6 < few["flat"]["kl_nats"]
    assert few["flat"]["attended_share"] < 0.2 < all_["flat"]["attended_share"] == 1
    assert "| full | 100.0 % | 0.0000 | 100.0 % |" in table(all_)


def test_caches_that_are_rewound_take_no_generated_token_into_their_index(llm: LLM) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, llm.spec.vocab_size, (1, 200))
    settings = RetroInferConfig(attention_aware_graph={"top_k": 20, "insert_batch": 4}, static_pattern_end=8)
    names = ["flat", "attention_aware_graph", "attention_aware_graph+none"]
    both = compare(llm, ids, ["full", *names], settings, 20)
    alone = [compare(llm, ids, ["full", name], settings, 20)[name] for name in names]
    assert [both[name]["kl_nats"] for name in names] == [one["kl_nats"] for one in alone]


def test_the_last_token_is_not_decoded_further(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[torch.Tensor] = []
    decode_step = llm.decode_step
    monkeypatch.setattr(llm, "decode_step", lambda token, cache: steps.append(token) or decode_step(token, cache))
    ids = torch.arange(200)[None] % llm.spec.vocab_size
    rows = compare(llm, ids, ["full", "flat"], RetroInferConfig(), 5)
    assert len(steps) == 2 * 4
    assert torch.equal(torch.cat(steps[:4]), torch.cat(steps[4:]))
    assert rows["full"]["agreement"] == 1


def test_short_names_and_adapters_reach_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(*given: Any) -> LLM:
        asked.append(given)
        raise ValueError("stop here")

    monkeypatch.setattr(next_token, "load_tokenizer", lambda name: asked.append((name,)))
    monkeypatch.setattr(next_token, "load_model", load)
    assert main(["--model", "smollm2-135m", "--lora", "none", "--output", str(tmp_path / "o.json")]) == 2
    assert [given[0] for given in asked] == ["SmolLM2-135M-Instruct"] * 2
    assert asked[1][-1] == "none"


def test_prompts_begin_where_they_are_told_and_fit() -> None:
    first, later = prompt_ids(runner_job.Bytes(), 900, 0.0), prompt_ids(runner_job.Bytes(), 900, 0.5)
    assert 880 < first.shape[1] <= 900
    assert not torch.equal(first, later)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tokens 8192", "tokens: got 8192, allowed: 1 to 8191"),
        ("--prompts 0", "prompts: got 0, allowed: >= 1"),
        ("--strategies flat+guess", "estimation: got 'guess' in 'flat+guess', allowed: none, centroid"),
    ],
)
def test_bad_flags_are_told_before_the_model_is_loaded(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags.split(), "--output", str(tmp_path / "o.json")]) == 2
    assert message in capsys.readouterr().err
