"""Visits of the absorbing chain under uniform causal attention: what a score owes to its position alone."""

import torch
from torch import Tensor

from .chain_inputs import start_distribution
from .checks import check_gamma, check_sinks
from .linear_recurrence import following, reversed_recurrence


def null_model_visits(
    n: int,
    start: str | Tensor = "query",
    sink_size: int = 4,
    gamma: float = 1.0,
    window: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Scores [n] of `absorbing_chain_scores` on attention P_ij = 1 / (i + 1), in O(n), computed in float64.

    For the query start and gamma 1 that is 1 / j for every token j between the sinks and the query (algorithms.md 8.4).
    With S_j = sum over i >= j of x_i / (i + 1): x_j = (a_j + gamma S_{j+1}) (j + 1) / (j + 1 - gamma), and
    S_j = (S_{j+1} (j + 1) + a_j) / (j + 1 - gamma). `start` is a name or masses [n].
    Raises ValueError as `absorbing_chain_scores` does, and for masses of another shape.
    """
    check_sinks(sink_size, n)
    check_gamma(gamma)
    if isinstance(start, Tensor) and start.ndim != 1:
        raise ValueError(f"start: got shape {list(start.shape)}, allowed: [{n}]")
    mass = start_distribution(start, n, sink_size, window, torch.float64, device)
    position = torch.arange(1, n + 1, dtype=torch.float64, device=device)[sink_size:]
    flow = reversed_recurrence(-torch.log1p(-gamma / position), mass[sink_size:] / (position - gamma))
    visits = mass.clone()
    visits[:sink_size] += gamma * flow[0]
    visits[sink_size:] += gamma * following(flow)
    visits[sink_size:] *= position / (position - gamma)
    return visits.to(dtype)
