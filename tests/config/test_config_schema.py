"""The typed sections: defaults, ranges, and errors of one line that name the key, the value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from config import (
    ATTENTION_TYPES,
    RETRIEVAL_STRATEGIES,
    ConfigError,
    FlatConfig,
    GraphConfig,
    HNSWConfig,
    IVFConfig,
    RetroInferConfig,
    resolve_strategy,
)

GRAPH_DEFAULTS = {
    "q_knn": 32,
    "query_stride": 4,
    "key_degree": 32,
    "key_links": 24,
    "projection": "auto",
    "key_metric": "attention",
    "ef_search": 160,
    "warm_start": 100,
    "resume_ef": 100,
    "top_k": 100,
    "index_dtype": "bfloat16",
    "graph_build_batch": 4096,
    "knn_backend": "auto",
    "estimation": "centroid",
    "estimation_budget": 1.0,
    "num_entries": 64,
    "insert_batch": 512,
}


def error_of(section: type, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def settings(**values: Any) -> RetroInferConfig:
    return RetroInferConfig(**{"retrieval_strategy": "flat", **values})


def test_graph_defaults() -> None:
    assert GraphConfig().model_dump() == GRAPH_DEFAULTS


def test_every_key_is_described() -> None:
    for section in (GraphConfig, FlatConfig, IVFConfig, HNSWConfig, RetroInferConfig):
        assert all(field.description for field in section.model_fields.values())


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("q_knn", 1, ">= 2"),
        ("query_stride", 0, ">= 1"),
        ("key_degree", 0, ">= 2"),
        ("key_degree", 1, ">= 2"),
        ("key_links", -1, ">= 0"),
        ("key_links", 33, "0 to 32 (key_degree)"),
        ("ef_search", 0, ">= 1"),
        ("resume_ef", -1, ">= 0"),
        ("top_k", 0, ">= 1"),
        ("graph_build_batch", 0, ">= 1"),
        ("num_entries", 0, ">= 1"),
        ("insert_batch", -1, ">= 0"),
        ("index_dtype", "int4", "'auto', 'float32', 'float16', 'bfloat16', 'int8'"),
        ("knn_backend", "cuvs", "'auto', 'native', 'faiss', 'triton', 'torch'"),
        ("estimation", "clusters", "'none', 'centroid', 'softmax_lift'"),
        ("estimation", None, "'none', 'centroid', 'softmax_lift'"),
        ("estimation_budget", 1.01, "0 to 1"),
        ("top_k", "100", "an integer >= 1"),
        ("top_k", 100.0, "an integer >= 1"),
        ("top_k", True, "an integer >= 1"),
    ],
)
def test_graph_value_out_of_range(key: str, value: Any, allowed: str) -> None:
    assert error_of(GraphConfig, **{key: value}) == f"{key}: got {value!r}, allowed: {allowed}"


@pytest.mark.parametrize(
    ("key", "value"),
    [("q_knn", 2), ("key_links", 0), ("key_links", 32), ("ef_search", 1), ("top_k", 1), ("top_k", 10**6)],
)
def test_graph_value_at_the_edge_is_accepted(key: str, value: Any) -> None:
    assert getattr(GraphConfig(**{key: value}), key) == value


def test_default_key_links_above_a_smaller_degree() -> None:
    assert error_of(GraphConfig, key_degree=8) == "key_links: got 24, allowed: 0 to 8 (key_degree)"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (IVFConfig, {"n_list": -1}, "n_list: got -1, allowed: >= 0"),
        (IVFConfig, {"n_list": 8, "n_probe": 9}, "n_probe: got 9, allowed: 0 to 8 (n_list)"),
        (IVFConfig, {"n_probe": "all"}, "n_probe: got 'all', allowed: an integer >= 0"),
        (IVFConfig, {"top_k": -1}, "top_k: got -1, allowed: >= 0"),
        (HNSWConfig, {"m": 1}, "m: got 1, allowed: >= 2"),
        (HNSWConfig, {"ef_construction": 0}, "ef_construction: got 0, allowed: >= 1"),
        (HNSWConfig, {"ef_search": 0}, "ef_search: got 0, allowed: >= 1"),
        (HNSWConfig, {"top_k": 1.5}, "top_k: got 1.5, allowed: an integer >= 0"),
    ],
)
def test_value_of_the_faiss_sections_out_of_range(section: type, values: dict[str, Any], message: str) -> None:
    assert error_of(section, **values) == message


def test_lists_searched_are_bounded_only_by_a_given_number_of_lists() -> None:
    assert IVFConfig(n_probe=1000).n_probe == 1000
    assert IVFConfig(n_list=8, n_probe=8).n_probe == 8


def test_the_faiss_strategies_take_the_graphs_top_k_unless_they_state_their_own() -> None:
    chosen = settings(attention_aware_graph={"top_k": 7}, hnsw={"top_k": 9})
    assert chosen.top_k_of("flat") == chosen.top_k_of("ivf") == ("attention_aware_graph.top_k", 7)
    assert chosen.top_k_of("hnsw") == ("hnsw.top_k", 9)


@pytest.mark.parametrize("key", ["retrieval_budget", "estimation_budget", "cache_ratio"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, "0.5"])
def test_shares_lie_between_0_and_1(key: str, value: Any) -> None:
    message = error_of(RetroInferConfig, retrieval_strategy="flat", **{key: value})
    assert message.startswith(f"{key}: got {value!r}, allowed: ")
    assert message.endswith("0 to 1")
    assert getattr(settings(**{key: 1}), key) == 1.0
    assert getattr(settings(**{key: 0.0}), key) == 0.0


@pytest.mark.parametrize(
    ("key", "lowest"),
    [
        ("static_pattern_start", 0),
        ("static_pattern_end", 1),
        ("core", 1),
        ("n_centroids", 1),
        ("n_segment", 1),
        ("pages_per_cluster", 1),
        ("buffer_cluster_num", 1),
    ],
)
def test_lowest_value_of_retroinfer_counts(key: str, lowest: int) -> None:
    assert getattr(settings(**{key: lowest}), key) == lowest
    message = error_of(RetroInferConfig, retrieval_strategy="flat", **{key: lowest - 1})
    assert message == f"{key}: got {lowest - 1}, allowed: >= {lowest}"


def test_switch_takes_no_number() -> None:
    message = error_of(RetroInferConfig, retrieval_strategy="flat", gpu_only=1)
    assert message == "gpu_only: got 1, allowed: true or false"


def test_unknown_key_lists_the_known_ones_and_the_nearest() -> None:
    message = error_of(GraphConfig, ef_serch=3)
    assert message.startswith("ef_serch: unknown key, got 3 (did you mean ef_search?), known keys: q_knn, query_stride")
    assert all(key in message for key in GRAPH_DEFAULTS)


def test_unknown_key_of_an_inner_section_names_that_section() -> None:
    message = error_of(RetroInferConfig, retrieval_strategy="flat", key_degree=3)
    assert "did you mean attention_aware_graph.key_degree?" in message


def test_unknown_key_that_several_sections_have_names_all_of_them() -> None:
    message = error_of(RetroInferConfig, retrieval_strategy="flat", ef_search=3)
    assert "did you mean attention_aware_graph.ef_search or hnsw.ef_search?" in message


def test_unlike_key_gets_no_guess() -> None:
    assert "did you mean" not in error_of(GraphConfig, zzz=3)


def test_a_key_named_self_is_unknown_like_any_other() -> None:
    assert error_of(GraphConfig, **{"self": 1}).startswith("self: unknown key")


def test_problems_of_both_levels_are_joined() -> None:
    message = error_of(
        RetroInferConfig, retrieval_strategy="flat", core=0, attention_aware_graph={"key_degree": 0, "q_knn": 1}
    )
    assert message.split("; ") == [
        "core: got 0, allowed: >= 1",
        "attention_aware_graph.q_knn: got 1, allowed: >= 2",
        "attention_aware_graph.key_degree: got 0, allowed: >= 2",
    ]


def test_section_that_is_no_section() -> None:
    message = error_of(RetroInferConfig, retrieval_strategy="flat", attention_aware_graph=5)
    assert message.startswith("attention_aware_graph: got 5, allowed: a section with the keys q_knn, query_stride")


def test_a_missing_strategy_is_retroinfers_own() -> None:
    assert RetroInferConfig().retrieval_strategy == "wave_index"


@pytest.mark.parametrize("strategy", ["annoy", "", None, ["flat"]])
def test_unknown_strategy(strategy: Any) -> None:
    message = error_of(RetroInferConfig, retrieval_strategy=strategy)
    assert message == f"retrieval_strategy: got {strategy!r}, allowed: {', '.join(map(repr, RETRIEVAL_STRATEGIES))}"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        GraphConfig().top_k = 5


@pytest.mark.parametrize("configured", RETRIEVAL_STRATEGIES)
def test_resolve_strategy(configured: str) -> None:
    chosen = settings(retrieval_strategy=configured)
    assert resolve_strategy("Full_Flash_Attn", chosen) == "full"
    assert resolve_strategy("RetroInfer", chosen) == configured
    for strategy in RETRIEVAL_STRATEGIES:
        assert resolve_strategy(strategy, chosen) == strategy


@pytest.mark.parametrize("attention_type", ["retroinfer", "waves", "", None])
def test_resolve_unknown_attention_type(attention_type: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_strategy(attention_type, settings())
    assert str(caught.value).startswith(f"attn_type: got {attention_type!r}, allowed: ")
    assert all(name in str(caught.value) for name in ATTENTION_TYPES + RETRIEVAL_STRATEGIES)
