"""What walkers draw from, as whole numbers: a draw is the same on every device and never meets rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_causal, check_sinks

# A probability p becomes round(p * 2^30): rows of up to 2^30 of them stay below 2^31.
_ONE = 2.0**30


@dataclass(frozen=True)
class WalkTables:
    """Cumulative widths of R transition matrices and S sources that walk on each.

    A walker at token i takes a 32-bit random word u, r = (u * total) >> 32 with total = the row's last entry, and goes
    to the first token whose entry is > r. So a token of width 0 is never drawn, nor one after i.
    """

    cumulative: Tensor  # [R, n, n] int32, row i up to column i
    starts: Tensor  # [R * S, n] int32: where a walk starts
    absorbing: Tensor  # [R * S, n] bool: where it ends

    @property
    def sources(self) -> int:
        """S"""
        return len(self.starts) // len(self.cumulative)


def transition_tables(
    transitions: Tensor, sink_size: int, start: str | Tensor, absorbing: Tensor | None = None
) -> WalkTables:
    """Tables of transitions [B, H, n, n] with one source each, R = B * H; see simulate_walks for the rest."""
    check_causal(transitions, "transitions")
    batch, heads, n, _ = transitions.shape
    ends = absorbing_tokens(transitions, sink_size, absorbing).view(batch * heads, n)
    return WalkTables(cumulative_rows(transitions), start_rows(start, ends), ends)


def cumulative_rows(transitions: Tensor) -> Tensor:
    """[R, n, n] int32 of checked transitions [B, H, n, n]."""
    return _widths(transitions.flatten(0, 1)).cumsum_(-1)


def absorbing_tokens(transitions: Tensor, sink_size: int, extra: Tensor | None) -> Tensor:
    """[B, H, n] bool: the sinks and the extra tokens (bool [n] or [B, H, n])."""
    batch, heads, n, _ = transitions.shape
    check_sinks(sink_size, n)
    ends = torch.arange(n, device=transitions.device).expand(batch, heads, n) < sink_size
    if extra is None:
        return ends
    if extra.dtype != torch.bool or tuple(extra.shape) not in ((n,), (batch, heads, n)):
        allowed = f"torch.bool [{n}] or [{batch}, {heads}, {n}]"
        raise ValueError(f"absorbing: got {extra.dtype} {list(extra.shape)}, allowed: {allowed}")
    return ends | extra.to(ends.device)


def start_rows(start: str | Tensor, absorbing: Tensor) -> Tensor:
    """Cumulative widths [R, n] int32 of a start; absorbing [R, n]."""
    n = absorbing.shape[1]
    if isinstance(start, Tensor):
        return _widths(_checked_start(start, n).to(absorbing.device)).cumsum_(-1).expand_as(absorbing).contiguous()
    if start == "query":
        tokens = torch.arange(n, device=absorbing.device) == n - 1
        return tokens.int().expand_as(absorbing).contiguous()
    if start != "uniform":
        raise ValueError(f"start: got {start!r}, allowed: 'query', 'uniform' or probabilities [{n}]")
    if bool(absorbing.all(1).any()):
        raise ValueError(f"absorbing: got all of the {n} tokens, allowed with start 'uniform': fewer")
    return (~absorbing).cumsum(1, dtype=torch.int32)


def _checked_start(start: Tensor, n: int) -> Tensor:
    """Raises ValueError unless start is a distribution [n]."""
    if tuple(start.shape) != (n,) or not start.is_floating_point():
        raise ValueError(f"start: got {start.dtype} {list(start.shape)}, allowed: probabilities [{n}]")
    total = float(start.double().sum())
    if not bool((start >= 0).all()) or not abs(total - 1) <= 1e-4:
        lowest = float(start.min())
        raise ValueError(f"start: got a lowest value of {lowest} and a sum of {total}, allowed: >= 0, sum 1")
    return start


def _widths(probabilities: Tensor) -> Tensor:
    """int32 of floats of any dtype."""
    exact = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    return (exact * _ONE).round_().int()
