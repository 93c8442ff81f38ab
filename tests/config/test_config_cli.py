"""The flags: a flag wins over the model's file, the file over the default; the same key twice is an error."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from config import ConfigError, GraphConfig, add_config_args, config_from_args, generate_config

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
Write = Callable[[Any], None]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_args(parser)
    return parser.parse_args(argv)


def section(*argv: str, model: str = MODEL, context_len: int = 8192) -> dict[str, Any]:
    return config_from_args(parse(*argv), model, context_len)["RetroInfer"]


def error_of(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        section(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model", [MODEL, "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "org/unheard-of"])
@pytest.mark.parametrize("context_len", [1024, 8192])
def test_no_flag_is_generate_config_with_its_defaults(model: str, context_len: int) -> None:
    assert config_from_args(parse(), model, context_len) == generate_config(model, context_len, "RetroInfer")


def test_every_graph_key_is_a_typed_flag() -> None:
    values = {
        "q_knn": 20,
        "query_stride": 2,
        "key_degree": 24,
        "key_links": 8,
        "projection": "roargraph",
        "key_metric": "cosine",
        "ef_search": 99,
        "warm_start": 7,
        "resume_ef": 30,
        "top_k": 50,
        "index_dtype": "float32",
        "graph_build_batch": 512,
        "knn_backend": "faiss",
        "estimation": "none",
        "num_entries": 5,
        "insert_batch": 64,
    }
    beyond_flags = {"estimation_budget": 0.5}
    assert values.keys() | beyond_flags.keys() == GraphConfig.model_fields.keys()
    argv = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    argv += ["--set", "attention_aware_graph.estimation_budget=0.5"]
    assert section(*argv)["attention_aware_graph"] == values | beyond_flags


def test_retroinfer_flags() -> None:
    numbers = ["--retrieval_budget", "0.1", "--estimation_budget", "0.2", "--cache_ratio", "0.3"]
    assert (
        section(*numbers, "--use_cuda_graph", "--gpu_only")
        == generate_config(MODEL, 8192, "RetroInfer", 0.1, 0.2, 0.3, True, True)["RetroInfer"]
    )
    assert parse().attn_type == "RetroInfer"
    assert section("--retrieval_strategy", "flat")["retrieval_strategy"] == "flat"


def test_file_holds_where_no_flag_is_given_and_a_flag_wins(write_config: Write) -> None:
    values = {"retrieval_budget": 0.3, "estimation_budget": 0.4, "cache_ratio": 0.5, "gpu_only": True}
    graph = {"top_k": 9, "ef_search": 77}
    write_config(
        {"RetroInfer": {**values, "use_cuda_graph": True, "retrieval_strategy": "flat", "attention_aware_graph": graph}}
    )
    kept = section(model="org/tiny")
    assert kept | values | {"use_cuda_graph": True, "retrieval_strategy": "flat"} == kept
    assert (kept["attention_aware_graph"]["top_k"], kept["attention_aware_graph"]["ef_search"]) == (9, 77)

    argv = ["--retrieval_budget", "0", "--no-gpu_only", "--top_k", "8", "--retrieval_strategy", "full"]
    changed = section(*argv, model="org/tiny")
    expected = kept | {"retrieval_budget": 0.0, "gpu_only": False, "retrieval_strategy": "full"}
    expected["attention_aware_graph"] = kept["attention_aware_graph"] | {"top_k": 8}
    assert changed == expected


def test_bad_value_in_the_file_is_reported_under_its_key(write_config: Write) -> None:
    write_config({"RetroInfer": {"retrieval_strategy": "flat", "retrieval_budget": "much"}})
    with pytest.raises(ConfigError, match=r"^RetroInfer\.retrieval_budget: got 'much', allowed: a number 0 to 1$"):
        section(model="org/tiny")


def test_set_reaches_every_key() -> None:
    argv = ["RetroInfer.core=3", "static_pattern_end=16", "attention_aware_graph.index_dtype=float32"]
    changed = section(*(part for setting in argv for part in ("--set", setting)), "--top_k", "5")
    expected = section() | {"core": 3, "static_pattern_end": 16}
    expected["attention_aware_graph"] = GraphConfig(index_dtype="float32", top_k=5).model_dump()
    assert changed == expected


def test_a_key_that_several_sections_have_is_told_apart_by_its_section() -> None:
    argv = ["--top_k", "5", "--set", "ivf.top_k=6", "--set", "hnsw.ef_search=7", "--ef_search", "8"]
    argv += ["--set", "flat.on_gpu=true"]
    changed, expected = section(*argv), section()
    expected["attention_aware_graph"] |= {"top_k": 5, "ef_search": 8}
    expected["flat"]["on_gpu"] = True
    expected["ivf"]["top_k"], expected["hnsw"]["ef_search"] = 6, 7
    assert changed == expected


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("a.b=3", ("a.b", 3)),
        ("a=0.5", ("a", 0.5)),
        ("a=true", ("a", True)),
        ('a={"b": 1}', ("a", {"b": 1})),
        ("a=float32", ("a", "float32")),
        ("a=x=y", ("a", "x=y")),
        ("a=", ("a", "")),
    ],
)
def test_value_of_set_is_json_or_text(text: str, setting: tuple[str, Any]) -> None:
    assert parse("--set", text).set == [setting]


@pytest.mark.parametrize("text", ["top_k", "=3", ""])
def test_malformed_set(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--set", text)
    assert f"got {text!r}, allowed: SECTION.KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "source"),
    [
        ("--top_k 5 --set attention_aware_graph.top_k=5", "--top_k"),
        ("--top_k 5 --set RetroInfer.attention_aware_graph.top_k=6", "--top_k"),
        ("--top_k 5 --set attention_aware_graph={}", "--top_k"),
        ("--retrieval_budget 0 --set retrieval_budget=0.5", "--retrieval_budget"),
        ("--no-gpu_only --set gpu_only=true", "--gpu_only"),
        ("--retrieval_strategy flat --set retrieval_strategy=full", "--retrieval_strategy"),
        ("--set core=3 --set RetroInfer.core=4", "--set core"),
        ("--set attention_aware_graph={} --set attention_aware_graph.top_k=4", "--set attention_aware_graph"),
    ],
)
def test_key_set_twice(argv: str, source: str) -> None:
    message = error_of(*argv.split())
    assert message.startswith(f"--set {argv.split()[-1].partition('=')[0]}: got ")
    assert message.endswith(f", but {source} sets it too; allowed: one of them")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--attn_type Flash", "attn_type: got 'Flash', allowed: Full_Flash_Attn, RetroInfer, full, flat, attention_a"),
        ("--retrieval_strategy lsh", "RetroInfer.retrieval_strategy: got 'lsh', allowed: 'full', 'flat', 'attention_"),
        ("--key_degree 0", "RetroInfer.attention_aware_graph.key_degree: got 0, allowed: >= 2"),
        ("--estimation best", "RetroInfer.attention_aware_graph.estimation: got 'best', allowed: 'none', 'centroid'"),
        ("--retrieval_budget -0.5", "RetroInfer.retrieval_budget: got -0.5, allowed: 0 to 1"),
        ("--cache_ratio nan", "RetroInfer.cache_ratio: got nan, allowed: a number 0 to 1"),
        ("--top_k 9000", "RetroInfer.attention_aware_graph.top_k: got 9000, allowed: 1 to 8192 (the context length)"),
        ("--set cores=3", "RetroInfer.cores: unknown key, got 3 (did you mean core?), known keys: static_pattern_st"),
        ("--set flat.scan_share=0", "RetroInfer.flat.scan_share: got 0, allowed: above 0, up to 1"),
        ("--set core=many", "RetroInfer.core: got 'many', allowed: an integer >= 1"),
        ("--attn_type full --retrieval_strategy flat", "retrieval_strategy: got 'flat', but attn_type 'full' runs"),
    ],
)
def test_bad_flag(argv: str, message: str) -> None:
    assert error_of(*argv.split()).startswith(message)


def test_help_states_reason_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "the first is the pivot" in text
    assert "(allowed: >= 2; default: the file's, 32 where it has none)" in text
