"""Walks from landmarks: tokens spread over a prompt, each the best of its segment."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_causal, check_sinks
from .importance import to_unit
from .walk_tables import WalkTables, absorbing_tokens, cumulative_rows
from .walks import check_walks, count_visits

NORMALIZATIONS = ("power", "reachable")
_POWER = 0.6


def choose_landmarks(h2o_scores: Tensor, count: int, spacing: int = 50, sink_size: int = 4) -> Tensor:
    """Ascending tokens [B, H, m] int64, `spacing` apart or more: the best of h2o_scores [B, H, n] in each of m equal
    segments of the tokens between the sinks and the last one, which every walk's query is; the lowest id of equals.

    m is `count` (published: 8 to 32), or fewer where segments would be shorter than `spacing`, but at least 1. Segments
    choose one after the other, each from what is far enough from the choice before it.

    Raises ValueError for scores that are NaN or of another shape and for numbers out of bounds.
    """
    if h2o_scores.dim() != 3 or not h2o_scores.is_floating_point():
        raise ValueError(f"h2o_scores: got {h2o_scores.dtype} {list(h2o_scores.shape)}, allowed: floats [B, H, n]")
    if bool(h2o_scores.isnan().any()):
        raise ValueError("h2o_scores: got NaN, allowed: numbers")
    for name, value in (("count", count), ("spacing", spacing)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, allowed: 1 or more")
    n = h2o_scores.shape[2]
    check_sinks(sink_size, n - 1)
    between = n - 1 - sink_size
    segments = min(count, max(between // spacing, 1))
    tokens = torch.arange(n, device=h2o_scores.device)
    chosen: list[Tensor] = []
    for segment in range(segments):
        begin, stop = (sink_size + between * place // segments for place in (segment, segment + 1))
        allowed = (tokens >= begin) & (tokens < stop)
        if chosen:
            allowed = allowed & (tokens >= chosen[-1][..., None] + spacing)
        best = h2o_scores.masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True)
        chosen.append((allowed & (h2o_scores == best)).int().argmax(-1))
    return torch.stack(chosen, -1)


def landmark_walks(
    attn: Tensor,
    landmarks: Tensor,
    num_walkers: int = 100,
    num_steps: int = 1500,
    sink_size: int = 4,
    absorbing_landmarks: bool = False,
    normalization: str = "power",
    seed: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Scores [B, H, n] float32 in [0, 1] of CircuitKV's landmark walkers.

    attn [B, H, n, n], causal, rows sum to 1; landmarks [B, H, m] int64 behind the sinks (choose_landmarks). num_walkers
    walk from every landmark and from the last token, whose visits count double, until they meet a sink or have made
    num_steps steps; with absorbing_landmarks also until they meet any other landmark. Visits are then divided by what
    is expected, by the highest of the tokens that are not sinks, and sinks have 1. Expected at token p is with
    normalization "power" (p - sink_size + 1)^-0.6, with "reachable" the number of walkers that start at p or later (a
    walker from the query is two).

    Raises ValueError for attention that is not causal, not finite or does not sum to 1, for landmarks that are sinks,
    not in the prompt or of another shape, and for names or numbers out of bounds.
    """
    check_causal(attn, "attn")
    check_walks(num_walkers, num_steps, seed)
    batch, heads, n, _ = attn.shape
    absorbing = absorbing_tokens(attn, sink_size, None)
    if landmarks.dtype != torch.int64 or landmarks.dim() != 3 or landmarks.shape[:2] != attn.shape[:2]:
        allowed = f"torch.int64 [{batch}, {heads}, m]"
        raise ValueError(f"landmarks: got {landmarks.dtype} {list(landmarks.shape)}, allowed: {allowed}")
    wrong = (landmarks < sink_size) | (landmarks >= n)
    if bool(wrong.any()):
        raise ValueError(f"landmarks: got {int(landmarks[wrong][0])}, allowed: {sink_size} to {n - 1}")
    if normalization not in NORMALIZATIONS:
        allowed = ", ".join(map(repr, NORMALIZATIONS))
        raise ValueError(f"normalization: got {normalization!r}, allowed: {allowed}")

    landmarks = landmarks.to(attn.device)
    tokens = torch.arange(n, device=attn.device)
    query = torch.full_like(landmarks[..., :1], n - 1)
    sources = torch.cat((landmarks, query), -1)
    own = sources[..., None] == tokens  # [B, H, m + 1, n]
    ends = absorbing[:, :, None].expand_as(own)
    if absorbing_landmarks:
        ends = ends | ((landmarks[..., None] == tokens).any(2)[:, :, None] & ~own)
    begins = own.cumsum(-1, dtype=torch.int32).view(-1, n)
    tables = WalkTables(cumulative_rows(attn), begins, ends.reshape(-1, n))
    visits = count_visits(tables, num_walkers, num_steps, seed, backend).view(own.shape)
    weight = torch.ones_like(sources)
    weight[..., -1] = 2
    total = (visits * weight[..., None]).sum(2)
    if normalization == "power":
        scores = total * (tokens - sink_size + 1).clamp(min=1) ** _POWER
    else:
        reaching = (weight[..., None] * (sources[..., None] >= tokens)).sum(2)
        scores = total / (num_walkers * reaching)
    return to_unit(scores, sink_size)
