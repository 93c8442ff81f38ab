"""load_config: the shipped files, models without a file, and files that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import config
from config import ConfigError, GraphConfig, RetroInferConfig, generate_config, load_config

MODELS = [
    "meta-llama/Llama-3.1-8B-Instruct",
    "gradientai/Llama-3-8B-Instruct-Gradient-1048k",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-72B-Instruct",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
]
Write = Callable[[Any], None]


@pytest.mark.parametrize("model", MODELS)
def test_shipped_file_is_complete_and_states_the_defaults(model: str) -> None:
    path = Path(config.__file__).parent / f"{model.partition('/')[2]}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    # SmolLM2 runs in float32 on a CPU as well as in bfloat16 on a GPU: neither should copy its keys.
    graph = GraphConfig(index_dtype="auto") if "SmolLM2" in model else GraphConfig()
    expected = RetroInferConfig(
        retrieval_strategy="auto",
        buffer_cluster_num=200 if "DeepSeek" in model else 32,
        attention_aware_graph=graph,
    )
    assert content == {"RetroInfer": expected.model_dump()}
    assert load_config(model) == content


def test_a_file_for_every_shipped_model_and_no_other() -> None:
    names = {path.stem for path in Path(config.__file__).parent.glob("*.json")}
    assert names == {model.partition("/")[2] for model in MODELS}


@pytest.mark.parametrize("name", ["org/unheard-of", "unheard-of", "folder/unheard-of.gguf"])
def test_model_without_a_file_gets_the_defaults(name: str) -> None:
    expected = RetroInferConfig(retrieval_strategy="auto").model_dump()
    assert load_config(name) == {"RetroInfer": expected}


@pytest.mark.parametrize("name", ["org/tiny", "tiny", "some/folder/tiny", "some/folder/tiny/"])
def test_last_component_names_the_file_and_missing_keys_are_filled(write_config: Write, name: str) -> None:
    write_config({"RetroInfer": {"retrieval_strategy": "flat", "attention_aware_graph": {"top_k": 7}}})
    section = load_config(name)["RetroInfer"]
    assert section["retrieval_strategy"] == "flat"
    assert section["attention_aware_graph"] == {**GraphConfig().model_dump(), "top_k": 7}
    assert section["static_pattern_end"] == 64


def test_broken_json_names_file_and_position(write_config: Write) -> None:
    write_config(b'{"RetroInfer": {\n  "core": 22,\n  oops\n}}')
    for call in (lambda: load_config("org/tiny"), lambda: generate_config("org/tiny", 4096, "RetroInfer")):
        with pytest.raises(ConfigError, match=r"^tiny\.json: not JSON, line 3 column 3: "):
            call()


def test_file_that_is_not_text(write_config: Write) -> None:
    write_config(b'{"RetroInfer": "\xff"}')
    with pytest.raises(ConfigError, match=r"^tiny\.json: not UTF-8 text, byte 16: "):
        load_config("org/tiny")


@pytest.mark.parametrize("content", [[], {}, {"RetroInfer": 3}, {"retroinfer": {}}, None])
def test_file_without_the_section(write_config: Write, content: Any) -> None:
    write_config(content)
    with pytest.raises(ConfigError) as caught:
        load_config("org/tiny")
    assert str(caught.value) == f'tiny.json: got {content!r}, allowed: an object with the section "RetroInfer"'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"RetroInfer": {"retrieval_strategy": "flat", "cores": 2}},
            "RetroInfer.cores: unknown key, got 2 (did you mea",
        ),
        (
            {"RetroInfer": {"retrieval_strategy": "flat"}, "Other": {}},
            "Other: unknown key, got {}, known keys: RetroIn",
        ),
        (
            {"RetroInfer": {"retrieval_strategy": None}},
            "RetroInfer.retrieval_strategy: got None, allowed: 'full', 'flat', 'attention_aware_graph'",
        ),
        (
            {"RetroInfer": {"retrieval_strategy": "flat", "attention_aware_graph": {"key_degree": 0}}},
            "RetroInfer.attention_aware_graph.key_degree: got 0, allowed: >= 2",
        ),
    ],
)
def test_bad_key_in_a_file_is_named_with_its_section(write_config: Write, content: Any, message: str) -> None:
    write_config(content)
    with pytest.raises(ConfigError) as caught:
        load_config("org/tiny")
    assert str(caught.value).startswith(message)
