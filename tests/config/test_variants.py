"""Variants: a strategy's name with an estimation."""

import pytest

from config import ConfigError, RetroInferConfig, with_estimation


def test_a_plain_name_keeps_the_settings() -> None:
    settings = RetroInferConfig(attention_aware_graph={"estimation": "none"})
    assert with_estimation("flat", settings) == ("flat", settings)


def test_an_estimation_replaces_the_configured_one_and_nothing_else() -> None:
    settings = RetroInferConfig(attention_aware_graph={"top_k": 7})
    strategy, changed = with_estimation("attention_aware_graph+none", settings)
    assert strategy == "attention_aware_graph"
    assert changed.attention_aware_graph.estimation == "none"
    expected = settings.attention_aware_graph.model_dump() | {"estimation": "none"}
    assert changed.attention_aware_graph.model_dump() == expected
    assert settings.attention_aware_graph.estimation == "centroid"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("annoy", "strategy: got 'annoy', allowed: full, flat"),
        ("annoy+none", "strategy: got 'annoy', allowed: full, flat"),
        ("flat+", "estimation: got '' in 'flat\\+', allowed: none, centroid, softmax_lift"),
        ("flat+tail", "estimation: got 'tail' in 'flat\\+tail', allowed: none, centroid, softmax_lift"),
        (
            "full+none",
            "strategy: got 'full\\+none', allowed: 'full'; an estimation goes with flat, attention_aware_graph",
        ),
        ("wave_index+none", "strategy: got 'wave_index\\+none', allowed: 'wave_index'"),
    ],
)
def test_others_are_answered_with_what_is_allowed(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_estimation(name, RetroInferConfig())
