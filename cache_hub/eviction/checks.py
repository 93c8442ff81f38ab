"""Checks that all scores over attention share."""

import math

import torch
from torch import Tensor

# How far a row's sum may lie from 1 before it is refused; attention of 16 bits, or once of 16 bits, is 2^-9 off.
_TOLERANCE = 1e-2
# Of queries and keys, with which the tiles of the blocked kernels fit in the shared memory of a GPU.
ROW_BYTES = 1024


def check_causal(attention: Tensor, name: str = "attention") -> None:
    """Raises ValueError unless attention is [B, H, n, n] of a floating dtype with finite, non-negative entries, zeros
    above the diagonal and rows that sum to 1, to within 0.01."""
    shape = tuple(attention.shape)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise ValueError(f"{name}: got shape {shape}, allowed: [B, H, n, n], nothing of it empty")
    if not attention.is_floating_point():
        raise ValueError(f"{name}: got {attention.dtype}, allowed: a floating dtype")
    sums = attention.sum(3, dtype=torch.promote_types(attention.dtype, torch.float32))
    for find, allowed in (
        (lambda: ~attention.isfinite(), "finite"),
        (lambda: attention < 0, "not negative"),
        (lambda: attention.triu(1) != 0, "0 above the diagonal (lower triangular)"),
    ):
        wrong = find()
        if bool(wrong.any()):
            where = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(f"{name}: got {float(attention[where])} at {list(where)}, allowed: {allowed}")
    off = (sums - 1).abs() > _TOLERANCE
    if bool(off.any()):
        where = tuple(off.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: got a sum of {float(sums[where])} for row {list(where)}, allowed: 1 to within {_TOLERANCE}"
        )


def check_sinks(sink_size: int, n: int) -> None:
    """Raises ValueError unless 1 <= sink_size < n."""
    if not 1 <= sink_size < n:
        raise ValueError(f"sink_size: got {sink_size}, allowed: 1 to {n - 1} (one less than the tokens)")


def check_gamma(gamma: float) -> None:
    """Raises ValueError unless 0 < gamma <= 1."""
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma: got {gamma}, allowed: above 0, at most 1")


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless 0 < temperature < infinity."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, allowed: above 0 and finite")


def choose_backend(name: str, tensor: Tensor, row_bytes: int | None = None) -> str:
    """The backend of that name, or for "auto" triton where the tensor lies on CUDA, is not float64, and has rows of at
    most row_bytes if that is given; else torch. Raises ValueError for one that cannot be used there."""
    narrow = row_bytes is None or tensor.shape[-1] * tensor.element_size() <= row_bytes
    fitting = ("triton", "torch") if tensor.is_cuda and tensor.dtype != torch.float64 and narrow else ("torch",)
    if name == "auto":
        return fitting[0]
    if name not in fitting:
        allowed = ", ".join(map(repr, ("auto", *fitting)))
        what = f"{tensor.dtype}, rows of {tensor.shape[-1]}, on {tensor.device}"
        raise ValueError(f"backend: got {name!r} for {what}, allowed there: {allowed}")
    return name
