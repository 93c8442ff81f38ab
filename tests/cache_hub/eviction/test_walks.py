"""The walkers in plain torch against exact visits, and what they refuse."""

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from walk_cases import attention, expected_visits, one_hot, sinks

from cache_hub.eviction.walk_reference import philox
from cache_hub.eviction.walk_tables import transition_tables
from cache_hub.eviction.walks import batched_walk_simulation, causal_influence_walk, count_visits, simulate_walks

N, SINKS = 200, 4


def starts(name: str) -> tuple[Any, Tensor]:
    """What is given, and the distribution that it means."""
    if name == "query":
        return name, one_hot(N, N - 1)
    if name == "uniform":
        return name, (~sinks(N, SINKS)).double() / (N - SINKS)
    some = torch.rand(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64) ** 4
    return some / some.sum(), some / some.sum()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_random_words_are_those_of_philox(counter: list[int], key: int, words: list[int]) -> None:
    """The known answers that its authors publish with Random123."""
    assert [int(word) for word in philox(key, *(torch.tensor([part]) for part in counter))] == words


@pytest.mark.parametrize("start", ["query", "uniform", "given"])
def test_visits_are_the_expected_ones(start: str) -> None:
    """Agreement test 5: z-scores of all tokens that are not certain to be visited once, in 6 heads."""
    walkers = 20_000
    given, distribution = starts(start)
    transitions = attention(2, 3, N)
    counts = simulate_walks(transitions, walkers, None, SINKS, given, seed=3)
    assert counts.dtype == torch.int64
    assert counts.shape == (2, 3, N)
    mean, variance = expected_visits(transitions, sinks(N, SINKS), distribution)
    random = variance > 1e-9
    z = ((counts / walkers - mean) / (variance / walkers).sqrt())[random]
    assert len(z) >= 6 * (N - 1)
    assert 0.9 <= z.square().mean().sqrt() <= 1.1
    assert z.abs().max() < 5
    assert abs(z.mean()) < 0.2


def test_the_error_falls_with_the_root_of_the_walkers() -> None:
    transitions = attention(1, 4, N, seed=1)
    mean, _ = expected_visits(transitions, sinks(N, SINKS), one_hot(N, N - 1))
    errors = []
    for walkers in (1_000, 10_000, 100_000):
        counts = simulate_walks(transitions, walkers, None, SINKS, seed=2)
        errors.append(float(((counts / walkers - mean).abs().sum(2) / mean.sum(2)).mean()))
    for larger, smaller in pairwise(errors):
        assert 0.4 < math.log10(larger / smaller) < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_walk_on_their_own_values(dtype: torch.dtype) -> None:
    transitions = attention(1, 2, N, dtype=dtype)
    exact = transitions.double() / transitions.double().sum(3, keepdim=True)
    counts = simulate_walks(transitions, 20_000, None, SINKS)
    mean, variance = expected_visits(exact, sinks(N, SINKS), one_hot(N, N - 1))
    random = variance > 1e-9
    z = ((counts / 20_000 - mean) / (variance / 20_000).sqrt())[random]
    assert 0.85 <= z.square().mean().sqrt() <= 1.15
    assert z.abs().max() < 5


@pytest.mark.parametrize("per_head", [False, True])
def test_further_tokens_absorb(per_head: bool) -> None:
    """Every walk ends once in an absorbing token, and visits of the others are those of the chain without it."""
    walkers, n = 20_000, 60
    transitions = attention(1, 3, n, seed=4)
    extra = torch.zeros(1, 3, n, dtype=torch.bool)
    extra[..., [20, 41]] = True
    if per_head:
        extra[0, 1] = False
        extra[0, 2, 30] = True
    counts = simulate_walks(transitions, walkers, None, SINKS, absorbing=extra if per_head else extra[0, 0])
    ends = extra | sinks(n, SINKS)
    assert bool(((counts * ends).sum(2) == walkers).all())
    mean, variance = expected_visits(transitions, ends, one_hot(n, n - 1))
    z = ((counts / walkers - mean) / (variance / walkers).sqrt())[variance > 1e-9]
    assert z.abs().max() < 5
    assert 0.85 <= z.square().mean().sqrt() <= 1.15


def test_a_walk_from_an_absorbing_token_is_that_visit() -> None:
    last = torch.arange(30) == 29
    counts = simulate_walks(attention(1, 2, 30), 70, 5, SINKS, absorbing=last)
    assert torch.equal(counts, 70 * last.long().expand(1, 2, 30))


def test_steps_are_bounded() -> None:
    """On the path i -> i - 1 the visits are known; elsewhere they are the terms of the truncated series."""
    path = torch.diag(torch.ones(19), -1)
    path[0, 0] = 1
    for steps in (1, 7, 15):
        counts = simulate_walks(path.expand(1, 2, 20, 20), 10, steps, SINKS)
        assert torch.equal(counts[0, 1], 10 * (torch.arange(20) >= 19 - steps).long())
    assert torch.equal(
        simulate_walks(path.expand(1, 1, 20, 20), 10, 100, SINKS)[0, 0, :5], torch.tensor([0] * 3 + [10] * 2)
    )
    transitions, walkers = attention(1, 1, N), 50_000
    leaving = transitions[0, 0].masked_fill(sinks(N, SINKS)[:, None], 0)
    term = one_hot(N, N - 1)
    series = term.clone()
    for _ in range(3):
        term = term @ leaving
        series += term
    counts = simulate_walks(transitions, walkers, 3, SINKS)
    assert int(counts.sum()) <= 4 * walkers
    # A walk of 3 steps visits a token twice at most, but for itself: Poisson's deviation is a good bound.
    assert bool(((counts[0, 0] / walkers - series).abs() <= 6 * (series / walkers).sqrt()).all())


def test_no_walk_goes_where_attention_is_zero() -> None:
    """Rows whose first and last entries are zero, and entries of which float32 sums would lose some."""
    transitions = attention(1, 2, 50, dtype=torch.float32)
    dead = torch.zeros(50, dtype=torch.bool)
    dead[[6, 7, 30, 48]] = True
    transitions[..., 10:, dead] = 0
    transitions /= transitions.sum(3, keepdim=True)
    counts = simulate_walks(transitions, 5_000, None, SINKS)
    assert not counts[..., [30, 48]].any()
    reaches_others_first = counts[..., :10].sum(2) > 0
    assert bool(reaches_others_first.all())


def test_a_seed_gives_the_same_walks_and_another_seed_others() -> None:
    transitions = attention(2, 2, 63)
    first, again, other = (simulate_walks(transitions, 300, 20, SINKS, seed=seed) for seed in (1, 1, 2**62 + 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    same = transitions[:1, :1].expand(1, 2, 63, 63)
    heads = simulate_walks(same, 300, 20, SINKS)[0]
    assert not torch.equal(heads[0], heads[1])


def test_walkers_add_up() -> None:
    tables = transition_tables(attention(1, 3, 40), SINKS, "uniform")
    parts = [count_visits(tables, count, 12, 9, first_walker=first) for first, count in ((0, 100), (100, 57))]
    assert torch.equal(count_visits(tables, 157, 12, 9), sum(parts))


def test_many_matrices_walk_as_one_does_and_apart_from_each_other() -> None:
    layers = [attention(2, 3, n, seed=n) for n in (31, 50, 31)]
    layers[2] = layers[0]
    extra = [torch.arange(layer.shape[2]) == 9 for layer in layers]
    counts = batched_walk_simulation(layers, 200, 30, SINKS, "uniform", 4, extra)
    assert [tuple(visits.shape) for visits in counts] == [(2, 3, 31), (2, 3, 50), (2, 3, 31)]
    assert torch.equal(counts[0], simulate_walks(layers[0], 200, 30, SINKS, "uniform", 4, extra[0]))
    assert not torch.equal(counts[0], counts[2])
    given = [torch.arange(layer.shape[2]).double() / sum(range(layer.shape[2])) for layer in layers]
    assert len(batched_walk_simulation(layers, 20, 30, SINKS, given)) == 3
    with pytest.raises(ValueError, match="start: got 2 tensors, allowed: 3, one per matrix"):
        batched_walk_simulation(layers, 20, 30, SINKS, given[:2])
    with pytest.raises(ValueError, match="absorbing: got 1 tensors, allowed: 3"):
        batched_walk_simulation(layers, 20, 30, SINKS, absorbing=extra[:1])


def test_influence_is_visits_over_the_root_of_the_tokens_behind() -> None:
    """Half of many walkers at the query, half behind the sinks, 10 steps, temperature 2, against the series."""
    n = 60
    given = attention(1, 2, n, spread=2.0)
    rows = given.sqrt() / given.sqrt().sum(3, keepdim=True)
    leaving = rows.masked_fill(sinks(n, SINKS)[:, None], 0)
    term = (one_hot(n, n - 1) + (~sinks(n, SINKS)).double() / (n - SINKS)).expand(1, 2, 1, n) / 2
    series = term.clone()
    for _ in range(10):
        term = term @ leaving
        series += term
    expected = (series[..., 0, :] / (n + 1 - torch.arange(n)).sqrt())[..., SINKS:]
    scores = causal_influence_walk(given, 100_000, 10, 2.0, SINKS)
    assert bool((scores[..., :SINKS] == 1).all())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores[..., SINKS:].double(), expected / expected.amax(2, keepdim=True), atol=0.015, rtol=0.05
    )


@pytest.mark.parametrize("walkers", [1, 2, 101])
def test_influence_is_between_0_and_1(walkers: int) -> None:
    scores = causal_influence_walk(attention(2, 2, 37, dtype=torch.bfloat16), walkers, sink_size=3)
    assert bool(((scores >= 0) & (scores <= 1)).all())
    assert bool((scores[..., :3] == 1).all())
    assert bool((scores[..., 3:].amax(2) == 1).all())


def test_the_halves_are_walkers_of_their_own() -> None:
    """51 from the query, then 50 with the next numbers: none shares random words with another."""
    given = attention(1, 2, 37)
    uniform = count_visits(transition_tables(given, SINKS, "uniform"), 50, 10, 6, first_walker=51)
    visits = (simulate_walks(given, 51, 10, SINKS, seed=6)[0] + uniform)[:, SINKS:]
    expected = visits / (38 - torch.arange(SINKS, 37)).sqrt()
    scores = causal_influence_walk(given, 101, seed=6)[0, :, SINKS:]
    torch.testing.assert_close(scores, expected / expected.amax(1, keepdim=True))


def test_a_low_temperature_makes_the_walk_greedy() -> None:
    given = attention(1, 1, 40, spread=3.0)
    token, path = 39, set()
    while token >= SINKS and token not in path:
        path.add(token)
        token = int(given[0, 0, token].argmax())
    scores = causal_influence_walk(given, 1, 100, 1e-4, SINKS)[0, 0]
    assert set(scores[SINKS:].nonzero()[:, 0].add(SINKS).tolist()) == path


def changed(place: tuple[int, int], value: float) -> Tensor:
    matrix = attention(1, 2, 20)
    matrix[(0, 1, *place)] = value
    return matrix


ERRORS = [
    ({"transitions": changed((3, 5), 0.1)}, r"transitions: got 0\.1 at \[0, 1, 3, 5\], allowed: 0 above the diagonal"),
    ({"transitions": changed((3, 2), math.nan)}, r"transitions: got nan at \[0, 1, 3, 2\], allowed: finite"),
    ({"transitions": changed((3, 2), -0.5)}, r"transitions: got -0\.5 at \[0, 1, 3, 2\], allowed: not negative"),
    ({"transitions": changed((3, 2), 1.0)}, r"transitions: got a sum of 1\..* for row \[0, 1, 3\], allowed: 1 "),
    ({"transitions": torch.ones(3, 3)}, r"transitions: got shape \(3, 3\), allowed: \[B, H, n, n\]"),
    ({"transitions": torch.ones(1, 1, 3, 3).long()}, r"transitions: got torch\.int64, allowed: a floating"),
    ({"num_walkers": 0}, r"num_walkers: got 0, allowed: 1 to "),
    ({"num_steps": 0}, r"num_steps: got 0, allowed: 1 to "),
    ({"seed": -1}, r"seed: got -1, allowed: 0 to "),
    ({"sink_size": 0}, r"sink_size: got 0, allowed: 1 to 19"),
    ({"sink_size": 20}, r"sink_size: got 20, allowed: 1 to 19"),
    ({"start": "hub"}, r"start: got 'hub', allowed: 'query', 'uniform' or probabilities \[20\]"),
    ({"start": torch.ones(20)}, r"start: got a lowest value of 1\.0 and a sum of 20\.0, allowed"),
    ({"start": torch.full((20,), math.nan)}, r"start: got a lowest value of nan"),
    ({"start": torch.ones(19) / 19}, r"start: got torch\.float32 \[19\], allowed: probabilities \[20\]"),
    ({"backend": "cuda"}, r"backend: got 'cuda' .*allowed there: 'auto', 'torch'"),
    ({"backend": "triton"}, r"backend: got 'triton' for torch.int32, rows of"),
    ({"absorbing": torch.ones(20)}, r"absorbing: got torch\.float32 \[20\], allowed: torch\.bool \[20\] or"),
    ({"absorbing": torch.ones(20).bool(), "start": "uniform"}, r"absorbing: got all of the 20 tokens"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_bad_input_is_told(wrong: dict[str, Any], message: str) -> None:
    good = {"transitions": attention(1, 2, 20), "num_walkers": 3, "num_steps": 5, "sink_size": 4}
    with pytest.raises(ValueError, match=message):
        simulate_walks(**{**good, **wrong})


def test_walks_that_do_not_end_are_told() -> None:
    stuck = changed((7, 7), 1.0)
    stuck[0, 1, 7, :7] = 0
    with pytest.raises(ValueError, match=r"Q\[7,7\] = 1 in matrix 1: token 7 is absorbing"):
        simulate_walks(stuck, 3, None, SINKS)
    assert simulate_walks(stuck, 100, 50, SINKS).sum() > 0
    simulate_walks(stuck, 3, None, SINKS, absorbing=torch.arange(20) == 7)
    slow = attention(1, 1, 20) * 1e-6
    slow.diagonal(dim1=2, dim2=3).add_(1 - 1e-6)
    with pytest.raises(ValueError, match=r"num_steps: got None, but \d+ of 3 walks were not absorbed within 1280"):
        simulate_walks(slow, 3, None, SINKS)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_told(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature: got .*, allowed: above 0"):
        causal_influence_walk(attention(1, 1, 20), temperature=temperature)


def test_walks_on_a_cpu_need_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from cache_hub.eviction.walks import simulate_walks\n"
        "print(int(simulate_walks(torch.eye(9).expand(1, 2, 9, 9), 3, 4, 1).sum()))"
    )
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert run.stdout.strip() == str(2 * 3 * 5), run.stderr
