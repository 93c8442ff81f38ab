"""Checks that all scores over attention matrices share."""

import torch
from torch import Tensor


def check_causal(attention: Tensor, name: str = "attention") -> None:
    """Raises ValueError unless attention is [B, H, n, n] of a floating dtype with finite, non-negative entries, zeros
    above the diagonal and rows that sum to 1 (to 1e-4, to 1e-2 in 16 bits)."""
    shape = tuple(attention.shape)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise ValueError(f"{name}: got shape {shape}, allowed: [B, H, n, n], nothing of it empty")
    if not attention.is_floating_point():
        raise ValueError(f"{name}: got {attention.dtype}, allowed: a floating dtype")
    sums = attention.sum(3, dtype=torch.promote_types(attention.dtype, torch.float32))
    tolerance = 1e-2 if attention.element_size() == 2 else 1e-4
    for find, allowed in (
        (lambda: ~attention.isfinite(), "finite"),
        (lambda: attention < 0, "not negative"),
        (lambda: attention.triu(1) != 0, "0 for columns after the row (causal)"),
    ):
        wrong = find()
        if bool(wrong.any()):
            where = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(f"{name}: got {float(attention[where])} at {list(where)}, allowed: {allowed}")
    off = (sums - 1).abs() > tolerance
    if bool(off.any()):
        where = tuple(off.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: got a sum of {float(sums[where])} for row {list(where)}, allowed: 1 to within {tolerance}"
        )


def check_sinks(sink_size: int, n: int) -> None:
    """Raises ValueError unless 1 <= sink_size < n."""
    if not 1 <= sink_size < n:
        raise ValueError(f"sink_size: got {sink_size}, allowed: 1 to {n - 1} (one less than the tokens)")
