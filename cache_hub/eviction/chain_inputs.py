"""What the chain scores share: where a walk starts, and how they tell that it cannot leave a token."""

from typing import NoReturn

import torch
from torch import Tensor

STARTS = ("query", "uniform", "window")


def start_distribution(
    start: str | Tensor, n: int, sink_size: int, window: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Mass with which the walk starts at each token: [n], or [B, H, n] where `start` is such a tensor.

    "query": the last token; "uniform": all tokens but the sinks alike; "window": the last `window` tokens alike; a
    tensor [n] or [B, H, n] of masses >= 0 is taken as it is, mass on a sink being absorbed there at once.
    Raises ValueError for another start, a window outside 1 to n - sink_size, and masses that are negative or NaN.
    """
    if isinstance(start, Tensor):
        if start.ndim not in (1, 3) or start.shape[-1] != n:
            raise ValueError(f"start: got shape {list(start.shape)}, allowed: [{n}] or [B, H, {n}]")
        mass = start.to(device=device, dtype=dtype)
        if not bool(((mass >= 0) & mass.isfinite()).all()):
            raise ValueError("start: got masses that are negative or not finite, allowed: >= 0")
        return mass
    if start not in STARTS:
        raise ValueError(f"start: got {start!r}, allowed: {', '.join(STARTS)} or a tensor of masses")
    if start == "window" and not 1 <= window <= n - sink_size:
        raise ValueError(f"window: got {window}, allowed: 1 to {n - sink_size} of {n} tokens with {sink_size} sinks")
    count = {"query": 1, "uniform": n - sink_size, "window": window}[start]
    mass = torch.zeros(n, dtype=dtype, device=device)
    mass[n - count :] = 1 / count
    return mass


def raise_absorbing(absorbing: Tensor, first: int = 0) -> NoReturn:
    """Raises ValueError naming the first token set in absorbing [B, H, tokens], whose column 0 is token `first`."""
    batch, head, at = (int(i) for i in absorbing.nonzero()[0])
    token = first + at
    raise ValueError(
        f"token {token} is absorbing: Q[{token},{token}] = 1 (batch {batch}, head {head}), so the chain is singular; "
        "allowed: every token but the sinks attends to an earlier one"
    )
