"""Prefixes: questions are answered as if the prompt had just been read, and nothing but its own model may load one."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers

from config import RetroInferConfig
from model_hub import Prefix, load_model, load_tokenizer
from model_hub.prefix import tokenizer_hash

TOKENS, ROOM, ANSWER = 200, 40, 12
STRATEGIES = ["full", "flat", "attention_aware_graph", "ivf", "hnsw"]


def settings(strategy, estimation="centroid", **graph):
    small = {"key_degree": 8, "key_links": 4, "num_entries": 6, "top_k": 10, "ef_search": 20, **graph}
    return RetroInferConfig(retrieval_strategy=strategy, attention_aware_graph={**small, "estimation": estimation})


def tokens(count, seed):
    return torch.randint(0, 250, (1, count), generator=torch.Generator().manual_seed(seed))


DOCUMENT, QUESTION, OTHER = tokens(TOKENS, 0), tokens(9, 1), tokens(17, 2)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    folder = str(tiny_folder("llama"))
    return load_model(folder, 512, "fp32", "cpu"), load_tokenizer(folder)


@pytest.fixture
def saved(tiny, tmp_path):
    """A folder with a graph's prefix, and its answer to QUESTION."""
    llm, tokenizer = tiny
    prefix = Prefix.prefill(llm, "attention_aware_graph", settings("attention_aware_graph"), DOCUMENT, ROOM)
    prefix.save(tmp_path / "prefix", tokenizer, "tiny", {"about": [1, "ä"]})
    return tmp_path / "prefix", prefix.answer(QUESTION, ANSWER)


def load(folder, llm, tokenizer=None, strategy="attention_aware_graph", room=ROOM, **changes):
    return Prefix.load(folder, llm, strategy, settings(strategy, **changes), room, tokenizer)


@pytest.mark.parametrize("estimation", ["none", "centroid", "softmax_lift"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_question_is_answered_as_by_the_prefix_that_was_saved(strategy, estimation, tiny, tmp_path, monkeypatch):
    llm, tokenizer = tiny
    chosen = settings(strategy, estimation)
    prefix = Prefix.prefill(llm, strategy, chosen, DOCUMENT, ROOM)
    prefix.save(tmp_path / "prefix", tokenizer)
    first, second = prefix.answer(QUESTION, ANSWER), prefix.answer(OTHER, ANSWER)

    monkeypatch.setattr(llm, "prefill", lambda *a, **k: pytest.fail("the prompt was read again"))
    loaded = Prefix.load(tmp_path / "prefix", llm, strategy, chosen, ROOM, tokenizer)
    assert torch.equal(loaded.token_ids, DOCUMENT)
    assert loaded.answer(OTHER, ANSWER) == second
    assert loaded.answer(QUESTION, ANSWER) == first
    assert llm.cache is loaded.cache
    assert llm.timing.decode_steps == 9 + ANSWER - 1
    assert len(first) == ANSWER


def test_under_full_attention_a_question_behind_a_prefix_is_one_prompt(tiny):
    llm, _ = tiny
    prefix = Prefix.prefill(llm, "full", settings("full"), DOCUMENT, ROOM)
    whole = torch.cat((DOCUMENT, QUESTION), 1)
    attn_config = {"RetroInfer": settings("full").model_dump()}
    assert [prefix.answer(QUESTION, ANSWER)] == llm.generate("full", whole, None, ANSWER, attn_config)


def test_an_answer_ends_with_a_stop_token(tiny):
    llm, _ = tiny
    prefix = Prefix.prefill(llm, "full", settings("full"), DOCUMENT, ROOM)
    answer = prefix.answer(QUESTION, ANSWER)
    assert prefix.answer(QUESTION, ANSWER, stop_ids={answer[3]}) == answer[: answer.index(answer[3]) + 1]


def test_a_prefix_that_has_answered_is_saved_without_what_was_asked(saved, tiny, tmp_path):
    llm, tokenizer = tiny
    folder, answer = saved
    prefix = load(folder, llm, tokenizer)
    prefix.answer(OTHER, ANSWER)
    prefix.save(tmp_path / "again", tokenizer, "tiny", {"about": [1, "ä"]})
    assert load(tmp_path / "again", llm).answer(QUESTION, ANSWER) == answer
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_search_may_be_another_one(saved, tiny):
    llm, tokenizer = tiny
    wide = load(saved[0], llm, tokenizer, top_k=60, ef_search=200, estimation="none")
    fresh_settings = settings("attention_aware_graph", top_k=60, ef_search=200, estimation="none")
    fresh = Prefix.prefill(llm, "attention_aware_graph", fresh_settings, DOCUMENT, ROOM)
    assert wide.answer(QUESTION, ANSWER) == fresh.answer(QUESTION, ANSWER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "flat"}, "strategy: got 'flat', allowed: 'attention_aware_graph'"),
        ({"key_links": 2}, "key_links: got 2, allowed: 4"),
        ({"index_dtype": "float16"}, "index_dtype: got 'float16', allowed: 'bfloat16'"),
        ({"estimation": "softmax_lift"}, "softmax_lift: got True, allowed: False"),
        ({"room": 0}, "max_new_length must be at least 1, got 0"),
        ({"room": 400}, "the longest prompt has 200 tokens and 400 new ones"),
    ],
)
def test_another_build_or_no_room_is_refused_before_a_file_is_read(changes, message, saved, tiny, monkeypatch):
    monkeypatch.setattr("model_hub.prefix.check_files", lambda *a: pytest.fail("files were read"))
    with pytest.raises(ValueError, match=message):
        load(saved[0], *tiny, **changes)


def test_another_model_is_refused(saved, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=r"model: got model_type 'qwen2', allowed: 'llama', as the model 'tiny'"):
        load(saved[0], load_model(str(tiny_folder("qwen2")), 512, "fp32", "cpu"))
    with pytest.raises(ValueError, match="model: got frequencies others"):
        load(saved[0], load_model(str(tiny_folder("llama-tied-llama3-rope")), 512, "fp32", "cpu"))
    with pytest.raises(ValueError, match="dtype: got bfloat16, allowed: float32"):
        load(saved[0], load_model(str(tiny_folder("llama")), 512, "bf16", "cpu"))


@pytest.mark.parametrize("weight", ["model.layers.2.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_other_weights_are_refused(weight, saved, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights[weight] = weights[weight] * 1.01
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="model: got other weights"):
        load(saved[0], load_model(str(tmp_path / "model"), 512, "fp32", "cpu"))


def test_another_tokenizer_is_refused(saved, tiny, tiny_folder):
    llm, tokenizer = tiny
    other = load_tokenizer(str(tiny_folder("llama")))
    assert tokenizer_hash(other) == tokenizer_hash(tokenizer)
    other("padded and cut", padding="max_length", max_length=5, truncation=True)
    assert tokenizer_hash(other) == tokenizer_hash(tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="tokenizer: got one of hash"):
        load(saved[0], llm, other)
    assert load(saved[0], llm).answer(QUESTION, ANSWER) == saved[1]


def test_bad_input_is_refused(saved, tiny, tmp_path):
    llm, _ = tiny
    prefix = load(saved[0], llm)
    with pytest.raises(ValueError, match="got 32 behind a question of 9 tokens, allowed: at least 1, and at most 40"):
        prefix.answer(QUESTION, 32)
    with pytest.raises(ValueError, match="max_new_length: got 0"):
        prefix.answer(QUESTION, 0)
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        prefix.answer(QUESTION[:, :0], 5)
    with pytest.raises(ValueError, match=r"allowed: 0\.\.259"):
        prefix.answer(QUESTION + 1000, 5)
    with pytest.raises(ValueError, match="got 2 questions, allowed: 1"):
        prefix.answer(QUESTION.repeat(2, 1), 5)
    with pytest.raises(ValueError, match="got 2 prompts, allowed: 1"):
        Prefix.prefill(llm, "flat", settings("flat"), DOCUMENT.repeat(2, 1), ROOM)
    with pytest.raises(ValueError, match="got 'wave_index', whose prefixes cannot be saved, allowed: full, flat"):
        Prefix.prefill(llm, "wave_index", settings("wave_index"), DOCUMENT, ROOM)
    with pytest.raises(ValueError, match="which is not empty"):
        prefix.save(saved[0])
    with pytest.raises(FileNotFoundError, match=r"has no prefix\.json"):
        load(tmp_path / "nothing", llm)
    assert prefix.answer(QUESTION, ANSWER) == saved[1]


def test_a_corrupted_file_is_refused(saved, tiny):
    path = Path(saved[0]) / "layer_001.index.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"layer_001\.index\.safetensors: got bytes whose SHA-256"):
        load(saved[0], *tiny)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"got {len(data) - 1} bytes, allowed: {len(data)}"):
        load(saved[0], *tiny)
