"""Landmarks, and the scores of walks from them against exact expectations."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from walk_cases import attention, expected_visits, one_hot, sinks

from cache_hub.eviction.landmarks import choose_landmarks, landmark_walks

SINKS = 4


def plain_choice(scores: list[float], count: int, spacing: int, sink_size: int) -> list[int]:
    between = len(scores) - 1 - sink_size
    segments = min(count, max(between // spacing, 1))
    chosen: list[int] = []
    for segment in range(segments):
        begin, stop = (sink_size + between * place // segments for place in (segment, segment + 1))
        near = [token for token in range(begin, stop) if not chosen or token - chosen[-1] >= spacing]
        chosen.append(max(near, key=lambda token: (scores[token], -token)))
    return chosen


@pytest.mark.parametrize(
    ("n", "count", "spacing", "sink_size"),
    [(1000, 8, 50, 4), (1009, 32, 50, 4), (127, 8, 50, 4), (63, 8, 50, 4), (63, 8, 7, 1), (20, 32, 1, 4), (6, 3, 9, 4)],
)
def test_landmarks_are_the_best_of_their_segments(n: int, count: int, spacing: int, sink_size: int) -> None:
    """With many equal scores, of which the lowest id wins; minus infinity is a score too."""
    scores = torch.randint(0, 9, (2, 3, n), generator=torch.Generator().manual_seed(n)).float()
    scores[0, 0] = -torch.inf
    found = choose_landmarks(scores, count, spacing, sink_size)
    assert found.dtype == torch.int64
    for head, tokens in zip(scores.view(6, n).tolist(), found.view(6, -1).tolist(), strict=True):
        assert tokens == plain_choice(head, count, spacing, sink_size)
        assert sink_size <= tokens[0] <= tokens[-1] < n - 1
        assert all(later - sooner >= spacing for sooner, later in pairwise(tokens))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"h2o_scores": torch.ones(9)}, r"h2o_scores: got torch\.float32 \[9\], allowed: floats \[B, H, n\]"),
        ({"h2o_scores": torch.full((1, 1, 9), torch.nan)}, r"h2o_scores: got NaN"),
        ({"count": 0}, r"count: got 0, allowed: 1 or more"),
        ({"spacing": 0}, r"spacing: got 0, allowed: 1 or more"),
        ({"sink_size": 8}, r"sink_size: got 8, allowed: 1 to 7"),
    ],
)
def test_a_bad_choice_is_told(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_landmarks(**{"h2o_scores": torch.ones(1, 1, 9), "count": 2, **wrong})


def exact_visits(matrix: Tensor, landmarks: list[int], absorbing_landmarks: bool) -> Tensor:
    """Of one walk from each landmark and two from the query, [n]."""
    n = len(matrix)
    total = torch.zeros(n, dtype=torch.float64)
    for source, weight in [*((token, 1) for token in landmarks), (n - 1, 2)]:
        ends = sinks(n, SINKS)
        if absorbing_landmarks:
            ends[[token for token in landmarks if token != source]] = True
        mean, _ = expected_visits(matrix, ends, one_hot(n, source))
        total += weight * mean
    return total


@pytest.mark.parametrize("normalization", ["power", "reachable"])
@pytest.mark.parametrize("absorbing_landmarks", [False, True])
def test_scores_are_visits_over_what_is_expected(absorbing_landmarks: bool, normalization: str) -> None:
    n = 63
    attn = attention(2, 2, n, seed=7)
    landmarks = choose_landmarks(attn.sum(2), 4, 10)
    landmarks[1, 1] = torch.tensor([SINKS, 6, 7, n - 1])
    scores = landmark_walks(
        attn, landmarks, 20_000, sink_size=SINKS, absorbing_landmarks=absorbing_landmarks, normalization=normalization
    )
    assert scores.dtype == torch.float32
    assert bool((scores[..., :SINKS] == 1).all())
    assert bool((scores[..., SINKS:].amax(2) == 1).all())
    places = torch.arange(n, dtype=torch.float64)
    for matrix, tokens, found in zip(attn.view(4, n, n), landmarks.view(4, -1), scores.view(4, n), strict=True):
        visits = exact_visits(matrix, tokens.tolist(), absorbing_landmarks)
        if normalization == "power":
            expected = visits / (1 / (places - SINKS + 1).clamp(min=1) ** 0.6)
        else:
            expected = visits / torch.tensor([2 + sum(int(m) >= token for m in tokens) for token in range(n)])
        expected = expected[SINKS:] / expected[SINKS:].max()
        torch.testing.assert_close(found[SINKS:].double(), expected, atol=0.025, rtol=0.05)


def test_landmarks_that_absorb_hide_what_lies_behind_them() -> None:
    """On the path i -> i - 1 nothing but a landmark's own walks passes it."""
    n = 30
    path = torch.diag(torch.ones(n - 1), -1)
    path[0, 0] = 1
    landmarks = torch.tensor([[[10, 20]]])
    scores = {}
    for absorbing in (False, True):
        given = {"absorbing_landmarks": absorbing, "normalization": "reachable"}
        scores[absorbing] = landmark_walks(path[None, None], landmarks, 10, **given)[0, 0]
    assert torch.equal(scores[False], torch.ones(n))
    expected = torch.ones(n)
    # Of 4, 3 and 2 walkers that could have come.
    expected[4:10], expected[10], expected[11:20] = 1 / 4, 2 / 4, 1 / 3
    torch.testing.assert_close(scores[True], expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"landmarks": torch.tensor([[[3, 9]]])}, r"landmarks: got 3, allowed: 4 to 19"),
        ({"landmarks": torch.tensor([[[9, 20]]])}, r"landmarks: got 20, allowed: 4 to 19"),
        ({"landmarks": torch.tensor([9])}, r"landmarks: got torch\.int64 \[1\], allowed: torch\.int64 \[1, 1, m\]"),
        ({"landmarks": torch.ones(1, 1, 2)}, r"landmarks: got torch\.float32 \[1, 1, 2\]"),
        ({"normalization": "sqrt"}, r"normalization: got 'sqrt', allowed: 'power', 'reachable'"),
        ({"num_walkers": 0}, r"num_walkers: got 0, allowed: 1 to"),
        ({"num_steps": 0}, r"num_steps: got 0, allowed: 1 to"),
        ({"sink_size": 0}, r"sink_size: got 0, allowed: 1 to 19"),
        (
            {"attn": torch.ones(1, 1, 20, 20) / 20},
            r"attn: got 0\.05.* at \[0, 0, 0, 1\], allowed: 0 above the diagonal",
        ),
        ({"backend": "cpu"}, r"backend: got 'cpu'"),
    ],
)
def test_bad_walks_are_told(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark_walks(**{"attn": attention(1, 1, 20), "landmarks": torch.tensor([[[6, 9]]]), **wrong})
