"""simple_test.py --save_prefix and --load_prefix on the default model."""

import json
from pathlib import Path
from typing import Any

import pytest

import simple_test
from benchmark import document
from benchmark.needle import needle_prompt, question_frame


def run(*argv: str) -> dict[str, Any]:
    outcome = simple_test.run(simple_test.parse_args(["--context_len", "260", "--gen_len", "8", *argv]))
    (result,) = outcome["results"].values()
    return result | {"config": outcome["config"]}


@pytest.fixture(scope="module")
def saved(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A saved needle document, and the record of the run that saved it."""
    folder = tmp_path_factory.mktemp("prefix") / "alice"
    return folder, run("--save_prefix", str(folder))


def test_the_same_question_gets_the_same_answer_without_prefill(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, first = saved
    monkeypatch.setattr("model_hub.LLM.prefill", lambda *a, **k: pytest.fail("the document was read again"))
    second = run("--load_prefix", str(folder))
    assert first["correct"] is second["correct"] is True
    assert second["answer"] == first["answer"]
    for name in ("prompt_tokens", "question_tokens", "new_tokens", "attended_share", "scored_share", "index_bytes"):
        assert second[name] == first[name]
    assert (second["prefill_seconds"], second["build_seconds"]) == (0, 0)
    assert second["load_seconds"] > 0 < first["build_seconds"]


def test_another_question_is_asked_in_the_same_frame(saved: Any) -> None:
    result = run("--load_prefix", str(saved[0]), "--question", "Who is it about?", "--ef_search", "300")
    assert result["correct"] is None
    assert result["config"]["asked"] == "\nWho is it about?<|im_end|>\n<|im_start|>assistant\n"
    assert "right             ?" in simple_test.report({"graph": result})


def test_a_document_from_a_file_and_full_attention(smollm2: Any, tmp_path: Path) -> None:
    lines = "\n".join(["Paris is in France.", "Rome is in Italy.", "Lima is in Peru."] * 3)
    (tmp_path / "data.json").write_text(json.dumps([{"input": lines, "outputs": "France"}]))
    options = ["--attn_type", "full", "--question", "Paris is in"]
    first = run("--save_prefix", str(tmp_path / "p"), "--data_path", str(tmp_path / "data.json"), *options)
    second = run("--load_prefix", str(tmp_path / "p"), "--attn_type", "full")
    assert second["answer"] == first["answer"]
    assert first["correct"] is second["correct"] is True


def test_document_and_question_are_the_needle_prompt(smollm2: Any) -> None:
    tokenizer = smollm2[1]
    needle = needle_prompt(tokenizer, 300, 0.5)
    assert needle.document + needle.question == needle.text
    assert needle.answer in needle.document
    before, after = question_frame(tokenizer)
    assert needle.question.startswith(before + "What is the special magic number for")
    assert after in needle.question


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--question", "Why?"], "question: got 'Why?', allowed: beside --save_prefix or --load_prefix"),
        (["--save_prefix", "{new}", "--load_prefix", "{saved}"], "allowed: one of them"),
        (["--save_prefix", "{new}", "--batch_size", "2"], "batch_size: got 2, allowed: 1, a prefix is one document"),
        (["--save_prefix", "{new}", "--question", " "], "question: got ' ', allowed: a text"),
        (["--save_prefix", "{saved}"], "which is not empty, allowed: an empty folder or a new one"),
        (["--save_prefix", "{new}/deeper"], "allowed: a new folder in one that exists"),
        (["--save_prefix", "{new}", "--attn_type", "wave_index"], "got 'wave_index', whose prefixes cannot be saved"),
        (["--load_prefix", "{new}"], "which has no prefix.json, allowed: a saved prefix"),
        (["--load_prefix", "{saved}", "--data_path", "x.json"], "data_path: got 'x.json', allowed: none beside"),
        (["--load_prefix", "{saved}", "--attn_type", "flat"], "strategy: got 'flat', allowed: 'attention_aware_graph'"),
        (["--load_prefix", "{saved}", "--key_links", "8"], "key_links: got 8, allowed: 24"),
        (["--load_prefix", "{saved}", "--dtype", "bf16"], "dtype: got bfloat16, allowed: float32"),
        (["--save_prefix", "{new}", "--data_path", "{two}", "--question", "?"], "data_path: got 2 inputs"),
    ],
)
def test_bad_input_is_one_clear_line_before_the_model_loads(
    argv: list[str],
    message: str,
    saved: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "two.json").write_text('[{"input": "a", "outputs": "b"}, {"input": "c", "outputs": "d"}]')
    places = {"{saved}": str(saved[0]), "{new}": str(tmp_path / "new"), "{two}": str(tmp_path / "two.json")}
    for mark, place in places.items():
        argv = [word.replace(mark, place) for word in argv]
    monkeypatch.setattr(document, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    monkeypatch.setattr("sys.argv", ["simple_test.py", "--context_len", "300", "--dtype", "fp32", *argv])
    assert simple_test.main() == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("simple_test.py: error: ")
    assert message in error
    assert not (tmp_path / "new").exists()


def test_the_default_model_without_its_adapter_is_another_model(saved: Any) -> None:
    with pytest.raises(ValueError, match="model: got frequencies others, allowed: the same rotary frequencies"):
        run("--load_prefix", str(saved[0]), "--lora", "none")
