"""Larger key sets out of those at hand: the tokens of several prompts in one, and pairs of kv heads as wider heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .exact_head import SINKS
from .traces import LayerTrace


def join_traces(traces: Sequence[LayerTrace]) -> LayerTrace:
    """One layer of several prompts as one prompt, in order; those behind the first lose their sinks, which no index
    would hold. A query sees the prompts before its own too. The tests of all, one prompt's after the other's;
    no predicted queries.

    Raises ValueError for traces that differ in kv heads, group or head dimension.
    """
    shapes = {(*trace.queries.shape[:2], trace.queries.shape[3]) for trace in traces}
    if len(shapes) > 1:
        raise ValueError(f"join_traces: got [kv heads, g, d] of {sorted(shapes)}, allowed: the same for all traces")
    first = traces[0]
    starts = [0] + [SINKS] * (len(traces) - 1)
    return LayerTrace(
        first.layer,
        torch.cat([trace.queries[:, :, start:] for trace, start in zip(traces, starts, strict=True)], 2),
        torch.cat([trace.keys[:, start:] for trace, start in zip(traces, starts, strict=True)], 1),
        torch.cat([trace.values[:, start:] for trace, start in zip(traces, starts, strict=True)], 1),
        torch.cat([trace.tests for trace in traces], 2),
        any(trace.held_out for trace in traces),
    )


def join_heads(trace: LayerTrace) -> LayerTrace:
    """Kv heads 0 and 1, 2 and 3 and so on as one of twice the head dimension, query heads likewise: a query's inner
    product with a key is the sum of both heads'. A last head without another is left out, and so are
    predicted queries.

    Raises ValueError for a trace of one kv head.
    """
    pairs = len(trace.keys) // 2
    if not pairs:
        raise ValueError("join_heads: got a trace of 1 kv head, allowed: 2 or more")

    def wider(states: Tensor) -> Tensor:
        return torch.cat((states[0 : 2 * pairs : 2], states[1 : 2 * pairs : 2]), -1)

    queries, keys, values, tests = (wider(part) for part in (trace.queries, trace.keys, trace.values, trace.tests))
    return LayerTrace(trace.layer, queries, keys, values, tests, trace.held_out)
