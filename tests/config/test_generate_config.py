"""generate_config: what RetroInfer's function overwrites, the overrides, and what is checked before a run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config import ConfigError, generate_config, load_config

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
Write = Callable[[Any], None]


def section(context_len: int = 8192, attn_type: str = "RetroInfer", *args: Any, **kwargs: Any) -> dict[str, Any]:
    return generate_config(MODEL, context_len, attn_type, *args, **kwargs)["RetroInfer"]


def error_of(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        section(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_signature_is_retroinfers() -> None:
    parameters = list(inspect.signature(generate_config).parameters.values())
    assert [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        ("model_name", inspect.Parameter.empty),
        ("context_len", inspect.Parameter.empty),
        ("attn_type", inspect.Parameter.empty),
        ("retrieval_budget", 0.018),
        ("estimation_budget", 0.232),
        ("cache_ratio", 0.0),
        ("use_cuda_graph", False),
        ("gpu_only", False),
    ]


@pytest.mark.parametrize(
    ("context_len", "n_segment", "n_centroids"),
    [
        (4 << 10, 1, 256),
        (8 << 10, 1, 512),
        (16 << 10, 2, 1024),
        (32 << 10, 4, 2048),
        (64 << 10, 8, 4096),
        (128 << 10, 16, 8192),
        (256 << 10, 32, 16384),
        (512 << 10, 64, 32768),
        (1 << 20, 128, 65536),
        (120_000, 15, 7440),  # a tie between 7440 and 7560: the lower one
        (12_288, 2, 768),  # 1.5 segments: Python rounds half to even
        (20_480, 2, 1280),  # 2.5 segments
        (9_064, 1, 568),  # 566 of 8: the nearer multiple lies above
        (1, 1, 8),
    ],
)
def test_cluster_counts(context_len: int, n_segment: int, n_centroids: int) -> None:
    counts = section(context_len, "Full_Flash_Attn")
    assert (counts["n_segment"], counts["n_centroids"]) == (n_segment, n_centroids)


def test_arguments_replace_the_values_of_the_file(write_config: Write) -> None:
    values = {
        "retrieval_strategy": "flat",
        "static_pattern_start": 8,
        "static_pattern_end": 32,
        "core": 4000,
        "n_centroids": 3,
        "n_segment": 3,
        "pages_per_cluster": 9,
        "retrieval_budget": 0.5,
        "estimation_budget": 0.5,
        "cache_ratio": 0.5,
        "buffer_cluster_num": 77,
        "use_cuda_graph": True,
        "gpu_only": True,
    }
    write_config({"RetroInfer": values})
    result = generate_config("org/tiny", 8192, "RetroInfer", 0.1, 0.2, 0.3)["RetroInfer"]
    assert 1 <= result["core"] < 4000
    assert result == {
        **load_config("org/tiny")["RetroInfer"],
        "core": result["core"],
        "n_centroids": 512,
        "n_segment": 1,
        "pages_per_cluster": 2,
        "retrieval_budget": 0.1,
        "estimation_budget": 0.2,
        "cache_ratio": 0.3,
        "use_cuda_graph": False,
        "gpu_only": False,
    }


@pytest.mark.parametrize(("context_len", "expected"), [(4095, 150), (4096, 150), (4097, 32)])
def test_buffer_of_a_short_context(context_len: int, expected: int) -> None:
    assert section(context_len)["buffer_cluster_num"] == expected


def test_buffer_of_the_file_is_kept() -> None:
    result = generate_config("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8192, "RetroInfer")
    assert result["RetroInfer"]["buffer_cluster_num"] == 200


@pytest.mark.parametrize(
    ("cpulist", "core"), [("0-23\n", 22), ("0-3,8-11\n", 6), ("0,2,4,6\n", 2), ("0-1\n", 1), ("5\n", 1), ("\n", 1)]
)
def test_core_is_numa_node_0_minus_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpulist: str, core: int) -> None:
    (tmp_path / "cpulist").write_text(cpulist)
    monkeypatch.setattr("config.config.NUMA_NODE_0", tmp_path / "cpulist")
    assert section()["core"] == core


@pytest.mark.parametrize(("count", "core"), [(16, 14), (2, 1), (None, 1)])
def test_core_without_numa_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int | None, core: int) -> None:
    monkeypatch.setattr("config.config.NUMA_NODE_0", tmp_path / "absent")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert section()["core"] == core


def test_overrides_are_applied_last() -> None:
    changed = section(
        overrides={
            "attention_aware_graph.ef_search": 200,
            "RetroInfer.attention_aware_graph.top_k": 50,
            "RetroInfer.buffer_cluster_num": 9,
            "core": 3,
            "n_centroids": 64,
        }
    )
    expected = section()
    expected |= {"buffer_cluster_num": 9, "core": 3, "n_centroids": 64}
    expected["attention_aware_graph"] |= {"ef_search": 200, "top_k": 50}
    assert changed == expected


def test_overrides_are_left_as_given() -> None:
    graph = {"ef_search": 200}
    result = section(overrides={"attention_aware_graph": graph, "attention_aware_graph.top_k": 5})
    assert (result["attention_aware_graph"]["ef_search"], result["attention_aware_graph"]["top_k"]) == (200, 5)
    assert graph == {"ef_search": 200}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention_aware_graph.key_degree", 0, "RetroInfer.attention_aware_graph.key_degree: got 0, allowed: >= 2"),
        (
            "attention_aware_graph.topk",
            3,
            "RetroInfer.attention_aware_graph.topk: unknown key, got 3 (did you mean top_k?)",
        ),
        ("graph.top_k", 3, "RetroInfer.graph: unknown key, got {'top_k': 3}"),
        ("core.x", 3, "RetroInfer.core.x: unknown key, core is a value ("),
        ("RetroInfer", {}, "RetroInfer.RetroInfer: unknown key, got {}"),
        ("", 3, "RetroInfer.: unknown key, got 3"),
    ],
)
def test_bad_override(key: str, value: Any, message: str) -> None:
    assert error_of(overrides={key: value}).startswith(message)


@pytest.mark.parametrize(
    ("name", "value"),
    [("retrieval_budget", -0.5), ("estimation_budget", 2), ("cache_ratio", -1), ("cache_ratio", None)],
)
def test_bad_budget_argument(name: str, value: Any) -> None:
    assert error_of(**{name: value}).startswith(f"RetroInfer.{name}: got {value!r}, allowed: ")


@pytest.mark.parametrize("context_len", [0, -1, 8192.0, "8192", True, None])
def test_bad_context_length(context_len: Any) -> None:
    assert error_of(context_len) == f"context_len: got {context_len!r}, allowed: an integer >= 1"


def test_top_k_above_the_context() -> None:
    name = "attention_aware_graph.top_k"
    message = f"RetroInfer.{name}: got 5000, allowed: 1 to 4999 (the context length)"
    assert error_of(4999, overrides={name: 5000}) == message
    assert error_of(4999, "flat", overrides={name: 5000}) == message
    assert section(5000, overrides={name: 5000})["attention_aware_graph"]["top_k"] == 5000


def test_a_context_attended_in_full_lets_the_default_top_k_pass_but_not_a_given_one() -> None:
    assert section(100)["attention_aware_graph"]["top_k"] == 100
    assert section(5)["attention_aware_graph"]["top_k"] == 100
    message = "RetroInfer.attention_aware_graph.top_k: got 9, allowed: 1 to 5 (the context length)"
    assert error_of(5, overrides={"attention_aware_graph.top_k": 9}) == message


@pytest.mark.parametrize("strategy", ["ivf", "hnsw"])
def test_top_k_above_the_context_is_named_by_the_section_that_states_it(strategy: str) -> None:
    key = f"{strategy}.top_k"
    message = f"RetroInfer.{key}: got 5000, allowed: 1 to 4999 (the context length)"
    assert error_of(4999, strategy, overrides={key: 5000}) == message
    assert section(4999, "flat", overrides={key: 5000})[strategy]["top_k"] == 5000
    graphs = "attention_aware_graph.top_k"
    assert error_of(4999, strategy, overrides={graphs: 5000}).startswith(f"RetroInfer.{graphs}: got 5000")
    assert section(4999, strategy, overrides={graphs: 5000, key: 10})[strategy]["top_k"] == 10


def test_more_lists_than_keys_to_index() -> None:
    lists = {"ivf.n_list": 500}
    message = "RetroInfer.ivf.n_list: got 500, allowed: 0 to 499 (the keys to index)"
    assert error_of(499 + 68, "ivf", overrides=lists) == message
    assert section(500 + 68, "ivf", overrides=lists)["ivf"]["n_list"] == 500
    assert section(499 + 68, "flat", overrides=lists)["ivf"]["n_list"] == 500


@pytest.mark.parametrize("attn_type", ["Full_Flash_Attn", "full"])
def test_full_attention_reads_no_top_k(attn_type: str) -> None:
    assert section(10, attn_type)["attention_aware_graph"]["top_k"] == 100


def test_unknown_attention_type() -> None:
    assert error_of(8192, "FlashAttn").startswith("attn_type: got 'FlashAttn', allowed: Full_Flash_Attn, RetroInfer, ")


def test_retrieval_strategy_argument() -> None:
    assert section()["retrieval_strategy"] == "auto"
    assert section(retrieval_strategy="flat")["retrieval_strategy"] == "flat"
    expected = "RetroInfer.retrieval_strategy: got 'annoy', allowed: 'full', 'flat', 'attention_aware_graph', "
    assert error_of(retrieval_strategy="annoy").startswith(expected)


def test_a_strategy_missing_in_the_file_is_wave_index_or_the_argument(write_config: Write) -> None:
    write_config({"RetroInfer": {}})
    run = lambda **given: generate_config("org/tiny", 8192, "RetroInfer", **given)["RetroInfer"]  # noqa: E731
    assert run()["retrieval_strategy"] == "wave_index"
    assert run(retrieval_strategy="flat")["retrieval_strategy"] == "flat"


def test_a_file_of_retroinfers_own_runs_unchanged(write_config: Write) -> None:
    file = {
        "static_pattern_start": 4,
        "static_pattern_end": 64,
        "core": 22,
        "n_centroids": 8192,
        "n_segment": 16,
        "pages_per_cluster": 2,
        "retrieval_budget": 0.018,
        "estimation_budget": 0.232,
        "cache_ratio": 0.05,
        "buffer_cluster_num": 32,
        "use_cuda_graph": False,
        "gpu_only": False,
    }
    write_config({"RetroInfer": file})
    result = generate_config("org/tiny", 131072, "RetroInfer")["RetroInfer"]
    assert (result["retrieval_strategy"], result["n_centroids"], result["n_segment"]) == ("wave_index", 8192, 16)


@pytest.mark.parametrize("given", [{"retrieval_strategy": "flat"}, {"overrides": {"retrieval_strategy": "flat"}}])
def test_strategy_beside_an_attention_type_that_runs_another(given: dict[str, Any]) -> None:
    assert error_of(8192, "Full_Flash_Attn", **given).startswith(
        "retrieval_strategy: got 'flat', but attn_type 'Full_Flash_Attn' runs 'full'; allowed: 'full', or attn_type "
    )
    assert section(8192, "flat", **given)["retrieval_strategy"] == "flat"


def test_attention_type_alone_may_differ_from_the_file() -> None:
    assert section(8192, "flat")["retrieval_strategy"] == "auto"


def test_calls_do_not_share_state() -> None:
    first = section()
    first["attention_aware_graph"]["top_k"] = 1
    assert section()["attention_aware_graph"]["top_k"] == 100
