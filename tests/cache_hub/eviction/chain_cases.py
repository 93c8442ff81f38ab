"""Queries, keys and attentions for the tests of the chain scores, and the overlap of selections."""

import numpy as np
import torch
from torch import Tensor


def queries_and_keys(
    n: int, heads: int = 2, kv_heads: int = 1, head_dim: int = 64, sink: float = 0.0, sharp: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """query [1, heads, n, D] and key [1, kv_heads, n, D], float64; every query's logit of the first 2 is `sink`."""
    generator = torch.Generator().manual_seed(seed)
    query = sharp * torch.randn(1, heads, n, head_dim, dtype=torch.float64, generator=generator)
    key = torch.randn(1, kv_heads, n, head_dim, dtype=torch.float64, generator=generator)
    query[..., 0], key[..., 0] = 8, 0
    key[:, :, :2] = 0
    key[:, :, :2, 0] = sink * head_dim**0.5 / 8
    return query, key


def dense_attention(query: Tensor, key: Tensor, temperature: float = 1.0) -> Tensor:
    """Causal softmax attention [B, H, n, n], each key repeated for the query heads of its group."""
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ repeated.mT / (query.shape[3] ** 0.5 * temperature)
    n = query.shape[2]
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)


def random_attention(n: int, sink: float = 0.0, seed: int = 0) -> Tensor:
    """Causal attention [2, 3, n, n] of normal logits, float64; `sink` is added to the logits of the first 2 tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(2, 3, n, n, dtype=torch.float64, generator=generator)
    logits[..., :2] += sink
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)


def start_masses(start: str, n: int, sink_size: int, window: int) -> Tensor:
    """Masses [n] of a start, float64."""
    mass = torch.zeros(n, dtype=torch.float64)
    mass[{"query": n - 1, "uniform": sink_size, "window": n - window}[start] :] = 1
    return mass / mass.sum()


def dense_visits(transitions: Tensor, mass: Tensor, absorbing: Tensor, gamma: float) -> Tensor:
    """Visits [..., n] by the dense inverse, for P [..., n, n], start masses [n] and absorbing tokens [n] bool."""
    kept = transitions.masked_fill(absorbing.unsqueeze(1), 0.0)
    return mass @ torch.from_numpy(np.linalg.inv(np.eye(len(mass)) - gamma * kept.numpy()))


def overlap(scores: Tensor, exact: Tensor, count: int, sink_size: int = 4) -> Tensor:
    """Share [B, H] of the `count` best tokens behind the sinks by `exact` that are among the best by `scores`."""
    best, found = (torch.zeros_like(exact, dtype=torch.bool) for _ in range(2))
    for chosen, by in ((best, exact), (found, scores.to(exact.dtype))):
        chosen.scatter_(2, by[..., sink_size:].topk(count, -1).indices + sink_size, True)
    return (best & found).sum(-1) / count
