"""Exact attention over a trace's prompt, in float64: what output errors are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from .traces import LayerTrace


def exact_attention(trace: LayerTrace) -> Tensor:
    """Full attention of every test query over the prompt, [Hkv, g, t, d] float64, scale 1 / sqrt(d)."""
    outputs = []
    for keys, values, tests in zip(trace.keys, trace.values, trace.tests, strict=True):
        logits = tests.double() @ keys.double().T / keys.shape[1] ** 0.5
        outputs.append(logits.softmax(-1) @ values.double())
    return torch.stack(outputs)


def relative_errors(outputs: Tensor, exact: Tensor) -> Tensor:
    """||o - o_exact||_2 / ||o_exact||_2 over the last dimension, float64; 0 / 0 is 0."""
    distance = (outputs.double() - exact.double()).norm(dim=-1)
    return distance / exact.double().norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
