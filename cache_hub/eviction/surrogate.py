"""Chain scores from the observation window alone: all earlier rows are taken to follow the window's profile."""

import torch
from torch import Tensor

from .chain_inputs import raise_absorbing, start_distribution
from .checks import check_gamma
from .linear_recurrence import following, reversed_recurrence

# Column sums of the window's attention are clipped to this from below, so that a prefix row of zeros stays a row.
_LEAST_PROFILE = 1e-12


def surrogate_chain_scores(
    window_attention: Tensor, start: str = "query", sink_size: int = 4, gamma: float = 1.0
) -> Tensor:
    """Expected (discounted) visits [B, H, n] where only the last W rows of attention are known; O(W n) time.

    window_attention [B, H, W, n]: rows n - W to n - 1, causal, each summing to 1. Every earlier row i is taken to be
    P_ij = h_j / H_{i-1} for j < i, with h the column sums of the window over the n - W tokens before it, clipped from
    below at 1e-12, and H_j = h_0 + ... + h_j (algorithms.md 8.3). Scores of the sinks are the mass absorbed there.
    start: "query", "uniform" (all tokens but the sinks) or "window" (the W last rows alike). Computed in float64 but
    for the window's own W x W solve, returned in the dtype of the input, float32 at least.

    With entry_j the mass that comes to j from the start and the window, x_j = entry_j + gamma h_j S_{j+1} where
    S_j = sum over i >= j of x_i / H_{i-1} follows S_j = S_{j+1} (1 + gamma h_j / H_{j-1}) + entry_j / H_{j-1}. For
    gamma 1 the factors telescope to H_j / H_{j-1}, which is section 8.3's h_j / H_j times the entries after j.

    Raises ValueError for sinks that reach into the window, gamma outside (0, 1], NaN, and a token of the window that
    attends to itself alone ("token 40 is absorbing: Q[40,40] = 1").
    """
    window, n = window_attention.shape[2:]
    prefix = n - window
    if not 1 <= sink_size <= prefix:
        raise ValueError(f"sink_size: got {sink_size}, allowed: 1 to {prefix}, the tokens before a window of {window}")
    check_gamma(gamma)
    attention = window_attention.to(torch.promote_types(window_attention.dtype, torch.float32))
    mass = start_distribution(start, n, sink_size, window, attention.dtype, attention.device)
    within = attention[..., prefix:]
    # A sum, not a difference from 1: heads of real models have tokens that attend to hardly anything but themselves.
    earlier = within.tril(-1)
    leaving = (1 - gamma) + gamma * (attention[..., :prefix].sum(-1) + earlier.sum(-1))
    if not bool((leaving > 0).all() & attention.sum().isfinite()):
        if not bool(attention.isfinite().all()):
            raise ValueError("window_attention: got NaN or infinity, allowed: rows that sum to 1")
        raise_absorbing(leaving <= 0, prefix)
    system = torch.diag_embed(leaving) - gamma * earlier
    started = mass[prefix:].expand(*attention.shape[:2], 1, window)
    in_window = torch.linalg.solve_triangular(system, started, upper=False, left=False)
    entry = (mass[:prefix] + gamma * (in_window @ attention[..., :prefix]).squeeze(2)).double()
    profile = attention[..., :prefix].sum(2, dtype=torch.float64).clamp(min=_LEAST_PROFILE)
    visits = entry.clone()
    if prefix > sink_size:
        before, inner = profile.cumsum(-1)[..., sink_size - 1 : -1], profile[..., sink_size:]
        flow = reversed_recurrence(torch.log1p(gamma * inner / before), entry[..., sink_size:] / before)
        visits[..., :sink_size] += gamma * profile[..., :sink_size] * flow[..., :1]
        visits[..., sink_size:] += gamma * inner * following(flow)
    return torch.cat((visits.to(attention.dtype), in_window.squeeze(2)), -1)
