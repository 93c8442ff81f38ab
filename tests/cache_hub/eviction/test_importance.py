"""From visits to scores, and from scores to the tokens that are kept."""

import math
from typing import Any

import pytest
import torch
from walk_cases import attention, expected_visits, one_hot, sinks

from cache_hub.eviction.importance import (
    compute_importance_scores,
    gaussian_smooth_ranks,
    rank_max_combination,
    score_entropy,
    select_top_k_tokens,
)
from cache_hub.eviction.walks import simulate_walks

COUNTS = torch.tensor([[[9, 50, 2, 4, 4, 0, 8]]])


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("none", [9, 50, 2, 4, 4, 0, 8]),
        ("max", [1, 1, 0.25, 0.5, 0.5, 0, 1]),
        ("rank", [1, 1, 0.25, 0.625, 0.625, 0, 1]),
        ("null_model", [16, 16, 4, 12, 16, 0, 8 * 6 / 7]),
    ],
)
def test_scores_are_as_named(method: str, expected: list[float]) -> None:
    scores = compute_importance_scores(COUNTS, method, sink_size=2)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[0, 0], torch.tensor(expected).float())
    of_floats = compute_importance_scores(COUNTS.double(), method, sink_size=2)
    assert of_floats.dtype == torch.float64
    torch.testing.assert_close(of_floats.float(), scores)


@pytest.mark.parametrize("start", ["query", "uniform"])
@pytest.mark.parametrize("sink_size", [1, 4])
def test_the_null_model_makes_uniform_attention_even(start: str, sink_size: int) -> None:
    """Exactly for expected visits, by default for walks from the query, and for the others with their own null."""
    n = 40
    uniform = (torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]).double()
    begin = one_hot(n, n - 1) if start == "query" else (~sinks(n, sink_size)).double() / (n - sink_size)
    visits, _ = expected_visits(uniform, sinks(n, sink_size), begin)
    null = None if start == "query" else visits
    scores = compute_importance_scores(3 * visits[None, None], "null_model", sink_size, null)
    torch.testing.assert_close(scores, torch.full((1, 1, n), 3.0).double())


def test_the_null_model_takes_the_bias_to_early_tokens_from_walkers() -> None:
    n = 200
    uniform = (torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]).expand(1, 1, n, n)
    scores = compute_importance_scores(simulate_walks(uniform, 20_000, None, 4), "null_model") / 20_000
    quarters = scores[0, 0, 4:].view(4, 49).mean(1)
    torch.testing.assert_close(quarters, torch.ones(4), atol=0.05, rtol=0)


def test_a_head_without_visits_has_scores_of_0() -> None:
    for method in ("max", "rank", "null_model"):
        scores = compute_importance_scores(torch.zeros(1, 2, 9), method)[..., 4:]
        assert torch.equal(scores, torch.full((1, 2, 5), 0.5 if method == "rank" else 0.0))
    no_null = torch.zeros(9)
    assert not compute_importance_scores(torch.ones(1, 2, 9), "null_model", 4, no_null).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((COUNTS[0], "max"), r"visit_counts: got shape \[1, 7\], allowed: \[B, H, n\]"),
        ((-COUNTS, "max"), r"visit_counts: got -9\.0 at \[0, 0, 0\], allowed: finite, 0 or more"),
        ((COUNTS * math.inf, "max"), r"visit_counts: got inf at"),
        ((COUNTS, "mean"), r"normalization_method: got 'mean', allowed: 'none', 'max', 'rank', 'null_model'"),
        ((COUNTS, "max", 7), r"sink_size: got 7, allowed: 1 to 6"),
        ((COUNTS, "max", 0), r"sink_size: got 0, allowed: 1 to 6"),
        ((COUNTS, "max", 4, torch.ones(7)), r"null_visits: got a tensor with 'max', allowed with: 'null_model'"),
        ((COUNTS, "null_model", 4, torch.ones(6)), r"null_visits: got shape \[6\], allowed: \[7\]"),
        ((COUNTS, "null_model", 4, -torch.ones(7)), r"null_visits: got -1\.0 at \[0\]"),
    ],
)
def test_bad_visits_are_told(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_importance_scores(*given)


def plain_selection(scores: list[float], budget: int, sink_size: int, window: int) -> list[int]:
    n = len(scores)
    always = [token for token in range(n) if token < sink_size or token >= n - window]
    others = [token for token in range(n) if token not in always]
    others.sort(key=lambda token: (-scores[token], token))
    return sorted(always + others[: budget - len(always)])


@pytest.mark.parametrize(("n", "sink_size", "window"), [(63, 4, 8), (63, 0, 0), (127, 1, 60), (5, 4, 1), (1, 0, 0)])
def test_the_highest_scores_are_kept_beside_sinks_and_window(n: int, sink_size: int, window: int) -> None:
    """All budgets, with many equal scores and infinite ones: the budget is met exactly."""
    scores = torch.randint(0, 5, (2, 3, n), generator=torch.Generator().manual_seed(n)).float()
    scores[0, 0, n // 2] = torch.inf
    scores[0, 1, n // 2] = -torch.inf
    for budget in range(sink_size + window, n + 1):
        kept = select_top_k_tokens(scores, budget, sink_size, window)
        assert kept.shape == (2, 3, budget)
        assert kept.dtype == torch.int64
        assert kept.view(6, -1).tolist() == [
            plain_selection(row, budget, sink_size, window) for row in scores.view(6, n).tolist()
        ]
        assert torch.equal(select_top_k_tokens(scores[1, 2], budget, sink_size, window), kept[1, 2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": 11}, r"budget: got 11, allowed: 12 \(sink_size 4 \+ window 8\) to 20 \(all tokens\)"),
        ({"budget": 21}, r"budget: got 21, allowed: 12 .* to 20"),
        ({"window": -1}, r"window: got -1, allowed: 0 or more"),
        ({"sink_size": -1}, r"sink_size: got -1, allowed: 0 or more"),
        ({"window": 17}, r"budget: got 15, allowed: 21"),
        ({"scores": torch.ones(2, 20)}, r"scores: got shape \[2, 20\], allowed: \[B, H, n\] or \[n\]"),
        ({"scores": torch.full((20,), math.nan)}, r"scores: got NaN"),
    ],
)
def test_a_bad_selection_is_told(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_top_k_tokens(**{"scores": torch.ones(20), "budget": 15, "window": 8, **wrong})


def test_ranks_are_those_of_smoothed_scores() -> None:
    """By hand: weights of width 3, sigma 0.5 are e^-2, 1, e^-2; the ends go on as they are."""
    side = math.exp(-2) / (1 + 2 * math.exp(-2))
    row = torch.tensor([1.0, 0, 0, 5, 0, 0, 2])
    smooth = [1 - side, side, 5 * side, 5 * (1 - 2 * side), 5 * side, 2 * side, 2 * (1 - side)]
    below = [sum(other < value for other in smooth) + (smooth.count(value) - 1) / 2 for value in smooth]
    torch.testing.assert_close(gaussian_smooth_ranks(row.double(), 3, 0.5), torch.tensor(below).double() / 6)
    unsmoothed = gaussian_smooth_ranks(row.expand(2, 3, 7), 1, 1.0)
    torch.testing.assert_close(unsmoothed[1, 2], torch.tensor([4.0, 1.5, 1.5, 6, 1.5, 1.5, 5]) / 6)


def test_the_combination_takes_the_higher_rank() -> None:
    """Sinks have 1 and their visits leak into nothing; rows are smoothed by different widths."""
    torch.manual_seed(0)
    query, hub = torch.rand(2, 3, 41), torch.rand(2, 3, 41)
    combined = rank_max_combination(query, hub)
    by_query, by_hub = (gaussian_smooth_ranks(query[..., 4:], 3, 0.5), gaussian_smooth_ranks(hub[..., 4:], 5, 1.0))
    assert torch.equal(combined[..., 4:], torch.where(by_query > by_hub, by_query, by_hub))
    assert bool((combined[..., :4] == 1).all())
    assert bool(((combined >= 0) & (combined <= 1)).all())
    query[..., :4] = 1e6
    assert torch.equal(rank_max_combination(query, hub), combined)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_smooth_ranks(torch.ones(5), 2, 1.0), r"width: got 2, allowed: odd"),
        (lambda: gaussian_smooth_ranks(torch.ones(5), -1, 1.0), r"width: got -1, allowed: odd"),
        (lambda: gaussian_smooth_ranks(torch.ones(5), 3, 0.0), r"sigma: got 0\.0, allowed: above 0"),
        (lambda: gaussian_smooth_ranks(torch.full((5,), math.nan), 3, 1.0), r"scores: got NaN"),
        (lambda: rank_max_combination(torch.ones(9), torch.ones(8)), r"got shapes \[9\] and \[8\], allowed: equal"),
        (lambda: rank_max_combination(torch.ones(9), torch.ones(9), 9), r"sink_size: got 9, allowed: 1 to 8"),
        (lambda: score_entropy(torch.zeros(2, 3)), r"scores: got a row that sums to 0"),
        (lambda: score_entropy(torch.tensor([1.0, -2.0])), r"scores: got -2\.0 at \[1\]"),
    ],
)
def test_bad_scores_are_told(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_entropy_is_of_shares() -> None:
    rows = torch.tensor([[7.0, 0, 0, 0], [2, 2, 2, 2], [1, 3, 0, 0]])
    expected = torch.tensor([0, math.log(4), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)])
    torch.testing.assert_close(score_entropy(rows), expected)
    torch.testing.assert_close(score_entropy(rows.bfloat16()), expected)
    given = attention(2, 3, 30)
    assert score_entropy(given).shape == (2, 3, 30)
    torch.testing.assert_close(score_entropy(given), torch.distributions.Categorical(given).entropy())
