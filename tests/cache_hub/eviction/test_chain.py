"""Chain scores of dense attention against the dense inverse, series, limits and laws of flow, float64."""

import pytest
import torch
from chain_cases import dense_visits, random_attention, start_masses

from cache_hub.eviction.chain import (
    absorbing_chain_scores,
    compute_transition_matrix,
    landmark_absorbing_scores,
    personalized_pagerank_scores,
    visit_probabilities,
)
from cache_hub.eviction.null_model import null_model_visits

SINKS = 4
STARTS = ("query", "uniform", "window")


def uniform_attention(n: int) -> torch.Tensor:
    """P_ij = 1 / (i + 1), [1, 1, n, n]."""
    return (torch.ones(n, n, dtype=torch.float64).tril() / torch.arange(1, n + 1).unsqueeze(1)).view(1, 1, n, n)


def sinks_of(n: int) -> torch.Tensor:
    return torch.arange(n) < SINKS


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("sink", [0.0, 8.0])
@pytest.mark.parametrize("n", [5, 63, 127])
def test_the_solve_is_the_dense_inverse_and_the_series(n: int, sink: float, gamma: float) -> None:
    attention = random_attention(n, sink)
    window = min(n - SINKS, 8)
    for start in STARTS:
        scores = absorbing_chain_scores(attention, start, SINKS, 1.0, gamma, window)
        mass = start_masses(start, n, SINKS, window)
        torch.testing.assert_close(scores, dense_visits(attention, mass, sinks_of(n), gamma), rtol=1e-11, atol=1e-13)
        kept = attention.masked_fill(sinks_of(n).unsqueeze(1), 0.0)
        term = mass.expand(2, 3, 1, n)
        series = term.clone()
        for _ in range(5000):
            term = gamma * term @ kept
            series += term
            if term.max() < 1e-16:
                break
        torch.testing.assert_close(scores, series.squeeze(2), rtol=1e-9, atol=1e-12)


def test_masses_are_a_start_too() -> None:
    attention = random_attention(40)
    for start in STARTS:
        mass = start_masses(start, 40, SINKS, 6)
        named = absorbing_chain_scores(attention, start, SINKS, window=6)
        torch.testing.assert_close(absorbing_chain_scores(attention, mass, SINKS), named)
        torch.testing.assert_close(absorbing_chain_scores(attention, mass.expand(2, 3, 40), SINKS), named)


def test_mass_that_starts_on_a_sink_stays_there() -> None:
    mass = torch.zeros(40, dtype=torch.float64)
    mass[2] = 1
    assert torch.equal(absorbing_chain_scores(random_attention(40), mass, SINKS), mass.expand(2, 3, 40))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("start", STARTS)
def test_mass_is_absorbed_and_flow_is_conserved(start: str, gamma: float) -> None:
    n = 127
    attention = random_attention(n, 3.0)
    scores = absorbing_chain_scores(attention, start, SINKS, 1.0, gamma, 16)
    moving = scores.masked_fill(sinks_of(n), 0.0)
    mass = start_masses(start, n, SINKS, 16)
    torch.testing.assert_close(scores, mass + gamma * (moving.unsqueeze(2) @ attention).squeeze(2), rtol=1e-11, atol=0)
    if gamma == 1:
        torch.testing.assert_close(scores[..., :SINKS].sum(-1), torch.ones(2, 3).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sink_size", [1, 4, 16])
def test_under_uniform_attention_token_j_is_visited_once_in_j(sink_size: int) -> None:
    n = 127
    scores = absorbing_chain_scores(uniform_attention(n), "query", sink_size)[0, 0]
    position = torch.arange(sink_size, n - 1, dtype=torch.float64)
    torch.testing.assert_close(scores[sink_size:-1], 1 / position, rtol=1e-12, atol=0)
    probability = visit_probabilities(
        scores.view(1, 1, n), uniform_attention(n).diagonal(dim1=2, dim2=3).clone(), sink_size
    )
    torch.testing.assert_close(probability[0, 0, sink_size:-1], 1 / (position + 1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("n", "sink_size"), [(5, 4), (5, 1), (127, 4), (500, 16)])
def test_null_model_is_the_dense_solve_on_uniform_attention(n: int, sink_size: int, start: str, gamma: float) -> None:
    window = min(9, n - sink_size)
    expected = absorbing_chain_scores(uniform_attention(n), start, sink_size, 1.0, gamma, window)[0, 0]
    found = null_model_visits(n, start, sink_size, gamma, window, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_null_model_of_masses_and_of_a_million_tokens() -> None:
    mass = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = absorbing_chain_scores(uniform_attention(50), mass, SINKS)[0, 0]
    torch.testing.assert_close(null_model_visits(50, mass, SINKS, dtype=torch.float64), expected, rtol=1e-12, atol=0)
    n = 1 << 20
    visits = null_model_visits(n, dtype=torch.float64)
    torch.testing.assert_close(visits[4:-1], 1 / torch.arange(4, n - 1, dtype=torch.float64), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="start"):
        null_model_visits(50, mass.view(1, 1, 50), SINKS)


def test_visit_probabilities_are_those_of_hitting_the_token() -> None:
    """The probability of ever coming to j is the mass absorbed at j where j absorbs too."""
    n = 40
    attention = random_attention(n)
    visits = absorbing_chain_scores(attention, "query", SINKS)
    found = visit_probabilities(visits, attention.diagonal(dim1=2, dim2=3).clone(), SINKS)
    mass = start_masses("query", n, SINKS, 1)
    for token in range(n):
        absorbing = sinks_of(n) | (torch.arange(n) == token)
        hit = dense_visits(attention, mass, absorbing, 1.0)[..., token]
        torch.testing.assert_close(found[..., token], hit, rtol=1e-11, atol=1e-14)


def test_hot_chain_is_uniform_and_cold_chain_the_greedy_path() -> None:
    n = 63
    attention = random_attention(n)
    hot = absorbing_chain_scores(attention, "query", SINKS, temperature=1e9)
    torch.testing.assert_close(hot, null_model_visits(n, dtype=torch.float64).expand_as(hot), rtol=1e-6, atol=0)
    no_loops = attention - attention.diagonal(dim1=2, dim2=3).diag_embed()
    no_loops[..., 0, 0] = 1
    no_loops /= no_loops.sum(-1, keepdim=True)
    cold = absorbing_chain_scores(no_loops, "query", SINKS, temperature=1e-6)
    for scores, row in zip(cold.flatten(0, 1), no_loops.flatten(0, 1), strict=True):
        path = torch.zeros(n, dtype=torch.float64)
        token = n - 1
        path[token] = 1
        while token >= SINKS:
            token = int(row[token].argmax())
            path[token] = 1
        torch.testing.assert_close(scores, path, rtol=0, atol=1e-9)


def test_small_gamma_leaves_the_start_and_then_the_order_of_its_row() -> None:
    n = 63
    attention = random_attention(n)
    scores = absorbing_chain_scores(attention, "query", SINKS, gamma=1e-9)
    expected = torch.zeros(n, dtype=torch.float64)
    expected[-1] = 1
    torch.testing.assert_close(scores, expected.expand_as(scores), rtol=0, atol=2e-9)
    assert torch.equal(scores[..., :-1].argsort(-1), attention[..., -1, :-1].argsort(-1))


def test_transitions_are_powers_of_the_rows() -> None:
    attention = random_attention(30)
    attention[..., 7, 3] = 0
    attention = attention / attention.sum(-1, keepdim=True)
    powers = attention**0.5
    found = compute_transition_matrix(attention, 2.0)
    torch.testing.assert_close(found, powers / powers.sum(-1, keepdim=True), rtol=1e-12, atol=0)
    assert bool((found[..., 7, 3] == 0).all())
    assert bool((found.triu(1) == 0).all())
    torch.testing.assert_close(compute_transition_matrix(attention), attention, rtol=1e-13, atol=0)
    for temperature in (1e-30, 1e30):
        assert bool(compute_transition_matrix(attention.float(), temperature).isfinite().all())
    flat = uniform_attention(64).float()
    torch.testing.assert_close(compute_transition_matrix(flat, 1e-38), flat, rtol=1e-6, atol=0)


def test_later_rows_and_keys_change_nothing() -> None:
    n, query = 63, 40
    first, second = random_attention(n, seed=1), random_attention(n, seed=2)
    second[..., : query + 1, :] = first[..., : query + 1, :]
    mass = torch.zeros(n, dtype=torch.float64)
    mass[query] = 1
    scores = absorbing_chain_scores(first, mass, SINKS)
    assert torch.equal(scores, absorbing_chain_scores(second, mass, SINKS))
    assert bool((scores[..., query + 1 :] == 0).all())
    alone = absorbing_chain_scores(first[..., : query + 1, : query + 1], "query", SINKS)
    torch.testing.assert_close(scores[..., : query + 1], alone, rtol=1e-13, atol=0)


@pytest.mark.parametrize("n", [5, 63])
@pytest.mark.parametrize("alpha", [0.85, 0.2])
def test_pagerank_sums_to_one_and_is_the_power_iteration(n: int, alpha: float) -> None:
    attention = random_attention(n, 2.0)
    found = personalized_pagerank_scores(attention, alpha)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3).double(), rtol=1e-13, atol=0)
    query = start_masses("query", n, SINKS, 1).expand(2, 3, 1, n)
    rank = query
    for _ in range(400):
        rank = (1 - alpha) * query + alpha * rank @ attention
    torch.testing.assert_close(found, rank.squeeze(2), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_landmarks_are_one_chain_each(gamma: float) -> None:
    """Each walk against the dense inverse with its own absorbing set; the query may be a landmark itself."""
    n = 63
    attention = random_attention(n)
    powers = attention ** (1 / 1.5)
    transitions = powers / powers.sum(-1, keepdim=True)
    for landmarks in ([], [30], [50, 10, 30], [4, 20, n - 1]):
        found = landmark_absorbing_scores(attention, landmarks, SINKS, 1.5, gamma)
        assert found.shape == (2, 3, len(landmarks) + 1, n)
        for walk, source in enumerate([*landmarks, n - 1]):
            absorbing = sinks_of(n)
            absorbing[landmarks] = True
            absorbing[source] = False
            mass = torch.zeros(n, dtype=torch.float64)
            mass[source] = 1
            expected = dense_visits(transitions, mass, absorbing, gamma)
            torch.testing.assert_close(found[:, :, walk], expected, rtol=1e-11, atol=1e-14)


def test_every_head_may_have_landmarks_of_its_own() -> None:
    attention = random_attention(40)
    landmarks = torch.tensor([[10, 20], [30, 12], [5, 38]]).expand(2, 3, 2)
    found = landmark_absorbing_scores(attention, landmarks, SINKS)
    for head in range(3):
        alone = landmark_absorbing_scores(attention[:, head : head + 1], landmarks[0, head], SINKS)
        torch.testing.assert_close(found[:, head : head + 1], alone, rtol=1e-13, atol=0)


def test_a_token_that_hardly_leaves_itself_keeps_its_digits() -> None:
    """Float32 cannot hold 1 - Q_jj of 1e-10, but holds the weights that it is the sum of."""
    attention = random_attention(20).float()
    attention[..., 9, :] *= 1e-10 / attention[..., 9, :9].sum(-1, keepdim=True)
    attention[..., 9, 9] = 1
    exact = absorbing_chain_scores(attention.double(), "query", SINKS)
    torch.testing.assert_close(absorbing_chain_scores(attention, "query", SINKS).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_singular_chain_names_its_token(dtype: torch.dtype) -> None:
    attention = random_attention(20).to(dtype)
    attention[1, 2, 4] = 0
    attention[1, 2, 4, 4] = 1
    message = r"token 4 is absorbing: Q\[4,4\] = 1 \(batch 1, head 2\)"
    with pytest.raises(ValueError, match=message):
        absorbing_chain_scores(attention, "query", SINKS)
    with pytest.raises(ValueError, match=message):
        landmark_absorbing_scores(attention, [10], SINKS)
    with pytest.raises(ValueError, match=message):
        landmark_absorbing_scores(attention, [4], SINKS)
    assert bool(absorbing_chain_scores(attention, "query", 5).isfinite().all())
    assert bool(absorbing_chain_scores(attention, "query", SINKS, gamma=0.9).isfinite().all())
    assert absorbing_chain_scores(attention, "query", 5).dtype == torch.promote_types(dtype, torch.float32)


def test_bad_attention_is_told() -> None:
    attention = random_attention(20)
    above, unsummed, nan = attention.clone(), attention.clone(), attention.clone()
    above[0, 1, 6, 7], unsummed[1, 0, 6] = 0.1, unsummed[1, 0, 6] / 2
    nan[0, 0, 5, 2] = torch.nan
    for score in (absorbing_chain_scores, compute_transition_matrix, personalized_pagerank_scores):
        with pytest.raises(ValueError, match=r"attn: got 0.1 at \[0, 1, 6, 7\], allowed: 0 above the diagonal"):
            score(above)
        with pytest.raises(ValueError, match=r"attn: got a sum of 0.(5|49999)\d* for row \[1, 0, 6\]"):
            score(unsummed)
        with pytest.raises(ValueError, match=r"attn: got nan at \[0, 0, 5, 2\]"):
            score(nan)
        with pytest.raises(ValueError, match=r"attn: got shape \(2, 3, 20, 19\)"):
            score(attention[..., :19])


def test_bad_arguments_are_told() -> None:
    attention = random_attention(20)
    for arguments, message in (
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"gamma": 0.0}, "gamma: got 0.0"),
        ({"gamma": 1.1}, "gamma: got 1.1"),
        ({"sink_size": 0}, "sink_size: got 0, allowed: 1 to 19"),
        ({"sink_size": 20}, "sink_size: got 20"),
        ({"start": "landmark"}, "start: got 'landmark', allowed: query, uniform, window"),
        ({"start": "window", "window": 17}, "window: got 17, allowed: 1 to 16"),
        ({"start": torch.ones(19)}, r"start: got shape \[19\]"),
        ({"start": -torch.ones(20)}, "start: got masses that are negative"),
    ):
        with pytest.raises(ValueError, match=message):
            absorbing_chain_scores(attention, **arguments)  # type: ignore[arg-type]
    for alpha in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"alpha: got {alpha}"):
            personalized_pagerank_scores(attention, alpha)
    for landmarks, message in (([3], "got 3, allowed: 4 to 19"), ([20], "got 20"), ([7, 7], "got 7 more than once")):
        with pytest.raises(ValueError, match=message):
            landmark_absorbing_scores(attention, landmarks)
