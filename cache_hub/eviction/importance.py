"""From visits or scores to the tokens that are kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_sinks

NORMALIZATIONS = ("none", "max", "rank", "null_model")


def compute_importance_scores(
    visit_counts: Tensor, normalization_method: str, sink_size: int = 4, null_visits: Tensor | None = None
) -> Tensor:
    """Scores [B, H, n] of visits [B, H, n] (whole numbers become float32, floats keep their dtype).

    "none": the visits. "max": divided by the highest of the tokens behind the sinks. "rank": the share of the other
    tokens behind the sinks that have fewer visits, equal ones counted half, so in [0, 1]. "null_model": divided by the
    visits under uniform causal attention, null_visits [n], by default those of walks from the last token n - 1, which
    are 1 / j and n / (n - 1) for that token itself; where null_visits is 0 the score is 0. Sinks have 1 with "max" and
    "rank" and the highest of the others with "null_model", so they are never behind.

    Raises ValueError for visits that are negative, not finite or not [B, H, n], for an unknown method, a sink_size that
    is not 1 .. n - 1, and null_visits of another shape, negative or without "null_model".
    """
    if visit_counts.dim() != 3:
        raise ValueError(f"visit_counts: got shape {list(visit_counts.shape)}, allowed: [B, H, n]")
    visits = visit_counts if visit_counts.is_floating_point() else visit_counts.float()
    _check_weights(visits, "visit_counts")
    n = visits.shape[2]
    check_sinks(sink_size, n)
    if normalization_method not in NORMALIZATIONS:
        allowed = ", ".join(map(repr, NORMALIZATIONS))
        raise ValueError(f"normalization_method: got {normalization_method!r}, allowed: {allowed}")
    if null_visits is not None and normalization_method != "null_model":
        raise ValueError(f"null_visits: got a tensor with {normalization_method!r}, allowed with: 'null_model'")
    if normalization_method == "none":
        return visits
    if normalization_method == "max":
        return to_unit(visits, sink_size)
    if normalization_method == "rank":
        return _with_sinks(_ranks(visits[..., sink_size:]), sink_size)
    null = _query_null(visits) if null_visits is None else null_visits.to(visits.device)
    if null.shape != (n,):
        raise ValueError(f"null_visits: got shape {list(null.shape)}, allowed: [{n}]")
    _check_weights(null, "null_visits")
    scores = (torch.where(null > 0, visits / null, 0).to(visits.dtype))[..., sink_size:]
    return torch.cat((scores.amax(-1, keepdim=True).expand(*scores.shape[:2], sink_size), scores), -1)


def to_unit(scores: Tensor, sink_size: int) -> Tensor:
    """scores [..., n] float divided by the highest of the tokens behind the sinks (0 stays 0); sinks have 1."""
    others = scores[..., sink_size:]
    highest = others.amax(-1, keepdim=True)
    return _with_sinks(others / torch.where(highest > 0, highest, 1), sink_size)


def select_top_k_tokens(scores: Tensor, budget: int, sink_size: int = 4, window: int = 0) -> Tensor:
    """Ascending ids [..., budget] int64 of the tokens kept of scores [B, H, n] or [n]: the first sink_size, the last
    `window`, and of the others those with the highest scores, the lower id of equals.

    Raises ValueError for NaN, another shape, and a budget below sink_size + window or above n.
    """
    if scores.dim() not in (1, 3):
        raise ValueError(f"scores: got shape {list(scores.shape)}, allowed: [B, H, n] or [n]")
    if bool(scores.isnan().any()):
        raise ValueError("scores: got NaN, allowed: numbers")
    for name, value in (("sink_size", sink_size), ("window", window)):
        if value < 0:
            raise ValueError(f"{name}: got {value}, allowed: 0 or more")
    n = scores.shape[-1]
    always = sink_size + window
    if not always <= budget <= n:
        raise ValueError(
            f"budget: got {budget}, allowed: {always} (sink_size {sink_size} + window {window}) to {n} (all tokens)"
        )
    others = scores[..., sink_size : n - window]
    best = others.sort(dim=-1, descending=True, stable=True).indices[..., : budget - always] + sink_size
    tokens = torch.arange(n, device=scores.device).expand(scores.shape)
    return torch.cat((tokens[..., :sink_size], best.sort(-1).values, tokens[..., n - window :]), -1)


def gaussian_smooth_ranks(scores: Tensor, width: int, sigma: float) -> Tensor:
    """Ranks [..., n] in [0, 1] of scores [..., n] smoothed by a Gaussian over `width` neighbours (odd), those beyond
    the ends being like the end. A rank is the share of other tokens with a lower score, equal ones counted half.

    Raises ValueError for NaN, an even or negative width or a sigma that is not above 0.
    """
    if bool(scores.isnan().any()):
        raise ValueError("scores: got NaN, allowed: numbers")
    if width < 1 or width % 2 == 0:
        raise ValueError(f"width: got {width}, allowed: odd, 1 or more")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma: got {sigma}, allowed: above 0 and finite")
    n, half = scores.shape[-1], width // 2
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-half, half + 1)]
    exact = scores if scores.is_floating_point() else scores.float()
    places = torch.arange(n, device=scores.device)
    smooth = torch.zeros_like(exact)
    for offset, weight in zip(range(-half, half + 1), weights, strict=True):
        smooth += weight / sum(weights) * exact[..., (places + offset).clamp(0, n - 1)]
    return _ranks(smooth)


def rank_max_combination(query_influence: Tensor, hub_influence: Tensor, sink_size: int = 4) -> Tensor:
    """CircuitKV's combination, [..., n] in [0, 1]: the higher of a token's ranks by query influence (smoothed over 3
    tokens, sigma 0.5) and by hub influence (5 tokens, sigma 1), both [..., n]; sinks have 1.

    Only tokens behind the sinks are smoothed and ranked, so that the sinks' visits do not leak into their neighbours;
    the published code keeps them small instead (0.01 of the total).

    Raises ValueError for different shapes, NaN and a sink_size that is not 1 .. n - 1.
    """
    if query_influence.shape != hub_influence.shape:
        shapes = f"{list(query_influence.shape)} and {list(hub_influence.shape)}"
        raise ValueError(f"query_influence and hub_influence: got shapes {shapes}, allowed: equal ones")
    check_sinks(sink_size, query_influence.shape[-1])
    by_query = gaussian_smooth_ranks(query_influence[..., sink_size:], 3, 0.5)
    by_hub = gaussian_smooth_ranks(hub_influence[..., sink_size:], 5, 1.0)
    return _with_sinks(torch.maximum(by_query, by_hub), sink_size)


def score_entropy(scores: Tensor) -> Tensor:
    """Entropy [...] in nats of scores [..., n] as shares of their sum: 0 for one token that has all, log n for equals.

    Raises ValueError for scores that are negative or not finite, and rows that sum to 0.
    """
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    _check_weights(exact, "scores")
    total = exact.sum(-1, keepdim=True)
    if bool((total == 0).any()):
        raise ValueError("scores: got a row that sums to 0, allowed: above 0")
    return torch.special.entr(exact / total).sum(-1)


def _query_null(visits: Tensor) -> Tensor:
    """Expected visits [n] under uniform causal attention of walks from the last token; for sinks, who absorb, 1."""
    n = visits.shape[-1]
    null = 1 / torch.arange(n, device=visits.device, dtype=visits.dtype).clamp(min=1)
    null[-1] = n / (n - 1)
    return null


def _ranks(scores: Tensor) -> Tensor:
    """Share [..., n] of the other tokens with a lower score, equal ones counted half."""
    ordered = scores.sort(dim=-1).values
    below, not_above = (torch.searchsorted(ordered, scores.contiguous(), side=side) for side in ("left", "right"))
    rank = (below + not_above - 1).to(scores.dtype)
    return rank / (2 * max(scores.shape[-1] - 1, 1))


def _with_sinks(others: Tensor, sink_size: int) -> Tensor:
    """others [..., n - sink_size] behind sinks that have 1."""
    return torch.cat((torch.ones_like(others[..., :1]).expand(*others.shape[:-1], sink_size), others), -1)


def _check_weights(values: Tensor, name: str) -> None:
    wrong = ~(values.isfinite() & (values >= 0))
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}: got {float(values[tuple(where)])} at {where}, allowed: finite, 0 or more")
