"""Currents and effective resistances against the laws of resistor networks, float64."""

import numpy as np
import pytest
import torch
from chain_cases import random_attention

from cache_hub.eviction.chain import attention_conductances, effective_resistance_scores, grounded_potentials

SINKS = 4


def resistance(conductances: torch.Tensor, first: int, second: int) -> float:
    """Between two nodes of symmetric conductances [n, n]: they are moved to the first place and the last."""
    others = [node for node in range(len(conductances)) if node not in (first, second)]
    order = [first, *others, second]
    return float(grounded_potentials(conductances[order][:, order][None, None], 1)[0, 0, -1])


def path(conductances: list[float]) -> torch.Tensor:
    line = torch.tensor(conductances, dtype=torch.float64).diag(-1)
    return line + line.T


@pytest.mark.parametrize("sink", [0.0, 5.0])
def test_foster(sink: float) -> None:
    """Conductance times resistance, summed over the edges, is n - 1."""
    n = 12
    conductances = attention_conductances(random_attention(n, sink))[0, 0]
    total = sum(float(conductances[i, j]) * resistance(conductances, i, j) for i in range(n) for j in range(i))
    assert total == pytest.approx(n - 1, rel=1e-11)


def test_series_and_parallel() -> None:
    assert resistance(path([2.0, 0.5, 4.0]), 0, 3) == pytest.approx(1 / 2 + 1 / 0.5 + 1 / 4, rel=1e-13)
    bridged = path([2.0, 0.5, 4.0])
    bridged[0, 3] = bridged[3, 0] = 0.8
    assert resistance(bridged, 0, 3) == pytest.approx(1 / (0.8 + 1 / 2.75), rel=1e-13)


def test_rayleigh() -> None:
    """A larger conductance anywhere never raises a resistance, and lowers that of its own ends."""
    conductances = attention_conductances(random_attention(15))[0, 0]
    generator = torch.Generator().manual_seed(0)
    before = resistance(conductances, 0, 14)
    for _ in range(20):
        i, j = torch.randperm(15, generator=generator)[:2].tolist()
        raised = conductances.clone()
        raised[i, j] = raised[j, i] = conductances[i, j] * 1.5
        assert resistance(raised, 0, 14) <= before + 1e-14
        assert resistance(raised, i, j) < resistance(conductances, i, j)


@pytest.mark.parametrize("sink_size", [1, 4])
def test_potentials_are_visits_of_the_reversible_walk(sink_size: int) -> None:
    """N_qj = D_j v_j, with N of the walk whose steps are proportional to the conductances."""
    n = 63
    conductances = attention_conductances(random_attention(n, 2.0))
    assert bool((conductances.diagonal(dim1=2, dim2=3) == 0).all())
    degree = conductances.sum(-1)
    inner = (conductances / degree.unsqueeze(-1))[..., sink_size:, sink_size:]
    visits = torch.from_numpy(np.linalg.inv(np.eye(n - sink_size) - inner.numpy()))[..., -1, :]
    potentials = grounded_potentials(conductances, sink_size)
    torch.testing.assert_close((degree * potentials)[..., sink_size:], visits, rtol=1e-11, atol=0)
    assert bool((potentials[..., :sink_size] == 0).all())


@pytest.mark.parametrize("n", [5, 63])
def test_scores_are_the_current_through_each_token(n: int) -> None:
    """One unit leaves the query and comes into the sinks, half of it counted at each end; inside, in equals out."""
    attention = random_attention(n, 1.0)
    scores = effective_resistance_scores(attention, SINKS)
    conductances = attention_conductances(attention)
    potentials = grounded_potentials(conductances, SINKS)
    currents = conductances * (potentials.unsqueeze(-1) - potentials.unsqueeze(-2))
    torch.testing.assert_close(scores[..., -1], torch.full((2, 3), 0.5).double(), rtol=1e-11, atol=0)
    torch.testing.assert_close(scores[..., :SINKS].sum(-1), torch.full((2, 3), 0.5).double(), rtol=1e-11, atol=0)
    torch.testing.assert_close(scores[..., SINKS:-1], currents.clamp(min=0).sum(-1)[..., SINKS:-1], rtol=1e-9, atol=0)


def test_bad_networks_are_told() -> None:
    attention = torch.eye(10, dtype=torch.float64).expand(1, 2, 10, 10)
    with pytest.raises(ValueError, match=r"not connected with a sink \(batch 0, head 0\)"):
        effective_resistance_scores(attention)
    with pytest.raises(ValueError, match="sink_size: got 10, allowed: 1 to 9"):
        effective_resistance_scores(random_attention(10), 10)
    with pytest.raises(ValueError, match="above the diagonal"):
        effective_resistance_scores(torch.full((1, 1, 4, 4), 0.25))
