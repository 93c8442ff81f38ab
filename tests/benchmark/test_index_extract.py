"""Extraction: states of a tiny model against transformers' own, whole files only, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_cases import write_trace
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmark.index import __main__ as command
from benchmark.index import extract
from benchmark.index.prompts import ruler_prompt
from benchmark.index.recorder import as_float16, record_states
from benchmark.index.traces import file_name, open_folder
from benchmark.ruler.chat import chat_template
from benchmark.ruler.generator import Setting
from benchmark.ruler.samples import make_rows
from benchmark.ruler.sources import Sources
from benchmark.ruler.specs import TASKS
from model_hub import load_model

LAYERS, KV_HEADS, GROUP, DIM, LENGTH, STEPS = 3, 2, 2, 16, 150, 6


class Bytes:
    """Tokenizer of one token a byte."""

    eos_token_id = None
    bos_token = None
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return type("Encoding", (), {"input_ids": list(text.encode())})

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        vocab_size=256,
        num_attention_heads=KV_HEADS * GROUP,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def words(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a text as prompt, and a tokenizer that needs no file."""
    monkeypatch.setattr(extract, "load_tokenizer", lambda name: Bytes())
    text = "".join(chr(97 + i * i % 23) for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    settings = f"--model_name {model_folder} --device cpu --dtype fp32 --text {tmp_path / 'text.txt'}"
    return f"{settings} --context_len {LENGTH} --decode_tokens {STEPS} --output {tmp_path / 'trace'}".split()


def states_by_transformers(folder: Path, ids: list[int]) -> tuple[list[torch.Tensor], ...]:
    """Rotated queries [H, n, D], rotated keys and values [Hkv, n, D] of every layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    projected: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, given, out: projected.append(out))
    with torch.inference_mode():
        past = model(torch.tensor([ids]), use_cache=True).past_key_values
        cos, sin = model.model.rotary_emb(projected[0], torch.arange(len(ids))[None])
    queries = []
    for out in projected:
        heads = out.view(1, len(ids), -1, DIM).transpose(1, 2)
        queries.append(apply_rotary_pos_emb(heads, heads, cos, sin)[0][0])
    return queries, [layer.keys[0] for layer in past.layers], [layer.values[0] for layer in past.layers]


def test_states_are_those_of_the_model(model_folder: Path, words: list[str], tmp_path: Path) -> None:
    assert extract.main(words) == 0
    folder = tmp_path / "trace"
    info = json.loads((folder / "trace.json").read_text())
    assert (info["layers"], info["kv_heads"], info["group"], info["head_dim"]) == ([0, 1, 2], KV_HEADS, GROUP, DIM)
    assert (info["protocol"]["tokens"], info["protocol"]["dtype"], len(info["decoded"])) == (LENGTH, "fp32", STEPS)
    assert info["environment"]["packages"]["torch"]
    ids = list((tmp_path / "text.txt").read_bytes()[:LENGTH])
    queries, keys, values = states_by_transformers(model_folder, ids + info["decoded"])
    assert len(list(folder.iterdir())) == 1 + LAYERS * KV_HEADS
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            with np.load(folder / file_name(layer, head)) as arrays:
                assert all(arrays[name].dtype == np.float16 for name in arrays.files)
                group = queries[layer][head * GROUP : (head + 1) * GROUP].numpy()
                for name, expected in (
                    ("q", group[:, :LENGTH]),
                    ("q_decode", group[:, LENGTH:]),
                    ("k", keys[layer][head, :LENGTH].numpy()),
                    ("v", values[layer][head, :LENGTH].numpy()),
                ):
                    assert arrays[name].shape == expected.shape
                    np.testing.assert_allclose(arrays[name], expected, rtol=2e-3, atol=2e-3)
    assert command.main(["--traces", str(folder), "--strategies", "full", "--output", str(tmp_path / "o.json")]) == 0
    (row,) = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert row["output_error"]["worst_head"] < 1e-5


@pytest.mark.parametrize(("length", "layers"), [(LENGTH, "0-2"), (37, "2")])
def test_predicted_queries_are_of_what_enters_the_layer_before(
    model_folder: Path, words: list[str], tmp_path: Path, length: int, layers: str
) -> None:
    assert extract.main([*words, "--context_len", str(length), "--layers", layers]) == 0
    folder = open_folder(tmp_path / "trace")
    assert folder.predicted == {layer: min(64, length) for layer in folder.files if layer > 0}
    info = json.loads((tmp_path / "trace" / "trace.json").read_text())
    ids = list((tmp_path / "text.txt").read_bytes()[:length]) + info["decoded"]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    llm = load_model(str(model_folder), 512, "fp32", "cpu")
    with torch.inference_mode():
        entering = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        cos, sin = llm.cos_sin(torch.arange(len(ids))[None])
        for layer in folder.predicted:
            trace, last = folder.load(layer), slice(-min(64, length) - STEPS, None)
            states = entering[layer - 1][:, last], cos[:, last], sin[:, last]
            expected = llm.layers[layer].predict_query(*states)[0].unflatten(1, (KV_HEADS, GROUP)).permute(1, 2, 0, 3)
            assert trace.predicted is not None
            torch.testing.assert_close(trace.predicted.float(), expected, rtol=2e-3, atol=2e-3)
            asked = torch.cat((trace.queries, trace.tests), 2)[:, :, last]
            assert not torch.allclose(trace.predicted, asked, rtol=0.1, atol=0.1), "not the queries themselves"


def test_a_recorded_model_has_its_own_layers_back(model_folder: Path, tmp_path: Path) -> None:
    llm = load_model(str(model_folder), 512, "fp32", "cpu")
    layers, own = llm.layers, list(llm.layers)
    record_states(llm, list(range(70)), 2, tmp_path, [(1, 0)])
    assert (llm.layers is layers, layers) == (True, own)
    with pytest.raises(ValueError, match="token ids"):
        record_states(llm, [256], 2, tmp_path, [(1, 0)])
    assert (llm.layers is layers, layers) == (True, own)


def test_missing_files_are_made_and_whole_ones_kept(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "trace"
    assert extract.main([*words, "--layers", "1"]) == 0
    assert sorted(open_folder(folder).files) == [1]
    kept = (folder / file_name(1, 0)).stat().st_mtime_ns
    lost = (folder / file_name(1, 1)).read_bytes()
    (folder / file_name(1, 1)).unlink()
    (folder / "layer00_head00.npz.part").write_text("half")
    assert extract.main([*words, "--layers", "0-1"]) == 0
    assert sorted(open_folder(folder).files) == [0, 1]
    assert (folder / file_name(1, 0)).stat().st_mtime_ns == kept
    assert np.load(folder / file_name(1, 1))["k"].tobytes() in lost
    assert not list(folder.glob("*.part"))
    capsys.readouterr()
    monkeypatch.setattr(extract, "record_states", lambda *args: pytest.fail("the model ran"))
    assert extract.main([*words, "--layers", "0-1"]) == 0
    assert "all 4 files are there" in capsys.readouterr().out


def test_another_trace_is_not_mixed_in(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert extract.main([*words, "--layers", "0"]) == 0
    for change, told in (
        (["--context_len", "151"], "tokens: 150 there, 151 now"),
        (["--decode_tokens", "5"], "decode_tokens: 6 there, 5 now"),
        (["--dtype", "bf16"], "dtype: 'fp32' there, 'bf16' now"),
    ):
        assert extract.main([*words, *change]) == 2
        assert told in capsys.readouterr().err
    other = write_trace(tmp_path / "other", info=False)
    assert extract.main([*words, "--output", str(other)]) == 2
    assert "holds traces without trace.json" in capsys.readouterr().err


def test_a_failure_leaves_no_half_file(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Callable[..., None] = np.savez

    def full_disk(file: Any, **arrays: Any) -> None:
        write(file, **arrays)
        if "layer01_head01" in file.name:
            raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    assert extract.main(words) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "trace").iterdir()] == ["trace.json"]
    with pytest.raises(FileNotFoundError, match=r"has no files"):
        open_folder(tmp_path / "trace")
    monkeypatch.setattr(np, "savez", write)
    assert extract.main(words) == 0
    assert len(open_folder(tmp_path / "trace").files) == LAYERS


def test_states_above_float16_are_refused(
    model_folder: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"keys: got 70000, allowed: up to 65504"):
        as_float16(torch.tensor([1.0, -70000.0]), "keys")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight *= 1e6
    model.save_pretrained(tmp_path / "large")
    assert extract.main([*words, "--model_name", str(tmp_path / "large")]) == 2
    assert "values of layer 1, kv head 0: got" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "trace").iterdir()] == ["trace.json"]


def test_without_decoding_the_last_positions_are_the_tests(words: list[str], tmp_path: Path) -> None:
    assert extract.main([*words, "--decode_tokens", "0", "--layers", "2"]) == 0
    folder = open_folder(tmp_path / "trace")
    assert (folder.load(2).held_out, folder.tokens) == (True, LENGTH - 16)


def test_ruler_prompts_are_the_benchmarks_samples() -> None:
    pytest.importorskip("wonderwords", reason="the word lists are in the benchmark extra")
    sources, length = Sources(), 6000
    prompts = [ruler_prompt(Bytes(), "fwe", length, 7, index, "meta-llama3", sources) for index in range(2)]
    count = lambda text: len(text.encode())  # noqa: E731
    rows = make_rows(Setting(TASKS["fwe"], chat_template("meta-llama3", Bytes()), length, count, sources, seed=7), 2)
    for prompt, row in zip(prompts, rows, strict=True):
        assert bytes(prompt.ids).decode() == row["input"] + row["answer_prefix"]
        assert prompt.expected == row["outputs"]
        assert len(prompt.ids) + TASKS["fwe"].new_tokens <= length
    assert prompts[0].source["digest"] != prompts[1].source["digest"]
    assert {key: prompts[1].source[key] for key in ("task", "seed", "index")} == {"task": "fwe", "seed": 7, "index": 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--context_len", "401"], "context_len: got 401, allowed for"),
        (["--context_len", "0"], "context_len, decode_tokens: got 0, 6, allowed: >= 1, >= 0"),
        (["--layers", "3"], "layers: got 3, allowed: 0 to 2"),
        (["--layers", "x"], "layers: got 'x', allowed: numbers and ranges"),
        (["--model_name", "nowhere"], "model nowhere does not exist"),
    ],
)
def test_bad_arguments_are_told(
    words: list[str], capsys: pytest.CaptureFixture[str], change: list[str], told: str
) -> None:
    assert extract.main([*words, *change]) == 2
    error = capsys.readouterr().err
    assert told in error


def test_processes_of_a_launcher_take_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert extract.parse_args(["--text", "a", "--output", "b"]).device == "cuda:1"


def test_unknown_tasks_are_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    at = words.index("--text")
    assert extract.main([*words[:at], "--task", "nope", *words[at + 2 :]]) == 2
    assert "task: got 'nope', allowed: niah_single_1" in capsys.readouterr().err
