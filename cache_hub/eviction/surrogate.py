"""Chain scores from the observation window alone: all earlier rows are taken to follow the window's profile."""

import torch
from torch import Tensor

from .attention import causal_rows
from .chain_inputs import raise_absorbing, start_distribution
from .checks import ROW_BYTES, check_gamma, choose_backend
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
    _check_prefix(sink_size, prefix, window)
    check_gamma(gamma)
    attention = window_attention.to(torch.promote_types(window_attention.dtype, torch.float32))
    mass = start_distribution(start, n, sink_size, window, attention.dtype, attention.device)
    if not bool(attention.sum().isfinite()):
        raise ValueError("window_attention: got NaN or infinity, allowed: rows that sum to 1")
    earlier = attention[..., prefix:].tril(-1)
    # A sum, not a difference from 1: heads of real models have tokens that attend to hardly anything but themselves.
    in_window = _in_window(earlier, attention[..., :prefix].sum(-1) + earlier.sum(-1), mass, gamma)
    sent = (in_window @ attention[..., :prefix]).squeeze(2)
    profile = attention[..., :prefix].sum(2, dtype=torch.float64)
    visits = _before_window(profile, mass[:prefix] + gamma * sent, sink_size, gamma)
    return torch.cat((visits.to(attention.dtype), in_window.squeeze(2)), -1)


@torch.no_grad()
def window_chain_scores(
    query: Tensor,
    key: Tensor,
    start: str = "query",
    sink_size: int = 4,
    gamma: float = 1.0,
    window: int = 64,
    backend: str = "auto",
) -> Tensor:
    """`surrogate_chain_scores` [B, H, n] of the attention of the last `window` of query [B, n, H, D] to key
    [B, n, Hkv, D], float32 (float64 for float64).

    With backend "triton" (on CUDA as `blocked_chain_scores`; "auto" takes it where it can be) no row of attention is in
    memory: one kernel sums the rows, one the columns, plain and weighted by the visits of their rows. Raises ValueError
    as `surrogate_chain_scores`, for a window that leaves no token before it, and for another backend.
    """
    n, kv_heads, dim = key.shape[1:]
    prefix = n - window
    _check_prefix(sink_size, prefix, window)
    check_gamma(gamma)
    if choose_backend(backend, query, ROW_BYTES) == "torch":
        return surrogate_chain_scores(causal_rows(query, key, prefix, n).flatten(1, 2), start, sink_size, gamma)
    from .blocked_kernels import triton_log_sums, triton_received

    scale, mass = dim**-0.5, start_distribution(start, n, sink_size, window, torch.float32, query.device)
    states = query.transpose(1, 2), key.transpose(1, 2)
    total, others = triton_log_sums(*states, scale, prefix)
    asked, seen = (part[:, :, prefix:].float() for part in states)
    logits = (asked.unflatten(1, (kv_heads, -1)) @ seen.unsqueeze(2).mT).flatten(1, 2).mul_(scale)
    earlier = logits.sub_(total.unsqueeze(3)).exp_().tril_(-1)
    in_window = _in_window(earlier, (others - total).exp(), mass, gamma)
    given = torch.cat((torch.ones_like(in_window), in_window), 2)
    profile, sent = triton_received(*states, total, scale, given, prefix).unbind(2)
    visits = _before_window(profile.double(), mass[:prefix] + gamma * sent, sink_size, gamma)
    return torch.cat((visits.float(), in_window.squeeze(2)), -1)


def _check_prefix(sink_size: int, prefix: int, window: int) -> None:
    if window < 1:
        raise ValueError(f"window: got {window}, allowed: >= 1")
    if not 1 <= sink_size <= prefix:
        raise ValueError(f"sink_size: got {sink_size}, allowed: 1 to {prefix}, the tokens before a window of {window}")


def _in_window(earlier: Tensor, others: Tensor, mass: Tensor, gamma: float) -> Tensor:
    """Visits [B, H, 1, W] of the window's tokens, from the attention `earlier` [B, H, W, W] to others of them before,
    the attention `others` [B, H, W] to any token before, and what starts at each token [n]."""
    first = mass.shape[0] - earlier.shape[3]
    leaving = (1 - gamma) + gamma * others
    if not bool((leaving > 0).all() & leaving.sum().isfinite() & earlier.sum().isfinite()):
        if not bool(leaving.isfinite().all() & earlier.isfinite().all()):
            raise ValueError("query or key: got NaN or infinity, allowed: finite values")
        raise_absorbing(leaving <= 0, first)
    system = torch.diag_embed(leaving) - gamma * earlier
    started = mass[first:].expand(*earlier.shape[:2], 1, -1)
    return torch.linalg.solve_triangular(system, started, upper=False, left=False)


def _before_window(profile: Tensor, entry: Tensor, sink_size: int, gamma: float) -> Tensor:
    """Visits [B, H, n - W] float64 of the tokens before the window, from its column sums and what enters there."""
    profile, entry = profile.clamp(min=_LEAST_PROFILE), entry.double()
    prefix, visits = profile.shape[-1], entry.clone()
    if prefix > sink_size:
        before, inner = profile.cumsum(-1)[..., sink_size - 1 : -1], profile[..., sink_size:]
        flow = reversed_recurrence(torch.log1p(gamma * inner / before), entry[..., sink_size:] / before)
        visits[..., :sink_size] += gamma * profile[..., :sink_size] * flow[..., :1]
        visits[..., sink_size:] += gamma * inner * following(flow)
    return visits
