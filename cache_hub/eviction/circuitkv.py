"""CircuitKV: a token counts by how often walks backwards along the attention visit it. The names its users know.

Attention weights are conductances, sinks absorb; causal attention makes I - Q triangular, so that expected visits are
one back-substitution (see `chain`, `blocked`, `surrogate`), of which walkers are the Monte-Carlo estimate (`walks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config import ConfigError
from config.eviction import CircuitRows, CircuitScore

from .attention import causal_rows, rows_bytes
from .blocked import blocked_chain_scores, solve_bytes
from .chain import (
    absorbing_chain_scores,
    compute_transition_matrix,
    effective_resistance_scores,
    landmark_absorbing_scores,
    personalized_pagerank_scores,
    visit_probabilities,
)
from .importance import compute_importance_scores, rank_max_combination, select_top_k_tokens
from .landmarks import landmark_walks
from .null_model import null_model_visits
from .scorer import Pooling, Reduction, Scorer, over_group, pooled
from .surrogate import window_chain_scores
from .walks import batched_walk_simulation, causal_influence_walk, simulate_walks

if TYPE_CHECKING:
    from config import RetroInferConfig

    from ..memory import RunShape

_STARTS = {"query": "query", "hub": "uniform", "window": "window"}


@dataclass(frozen=True)
class CircuitKV(Scorer):
    """Expected visits of the absorbing chain over a prompt's attention, exactly or by the profile of its last rows."""

    kind: CircuitScore
    rows: CircuitRows
    observed: int
    temperature: float
    gamma: float
    probability: bool
    kernel_size: int
    pooling: Pooling
    group: Reduction

    @classmethod
    def of(cls, settings: RetroInferConfig) -> CircuitKV:
        own, shared, sinks = settings.circuitkv, settings.eviction, settings.static_pattern_start
        if sinks < 1:
            raise ConfigError(f"static_pattern_start: got {sinks}, allowed with circuitkv: >= 1, since sinks absorb")
        if own.rows == "window" and own.temperature != 1:
            raise ConfigError(f"circuitkv.temperature: got {own.temperature}, allowed with rows=window: 1")
        walks = (own.score, own.rows, own.window, own.temperature, own.gamma, own.count == "probability")
        return cls(sinks, shared.window, *walks, shared.kernel_size, shared.pooling, shared.group)

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        """As Scorer's; what is between sinks and window is pooled."""
        scores = over_group(self._by_query_head(query, key), self.group)
        first, last = self.sinks, key.shape[1] - self.window
        between = pooled(scores[..., first:last], self.kernel_size, self.pooling)
        return torch.cat((scores[..., :first], between, scores[..., last:]), -1)

    def scratch_bytes(self, shape: RunShape, cuda: bool) -> int:
        if self.kind == "direct" or (self.rows == "window" and not cuda):
            return rows_bytes(shape.heads, shape.kv_heads, shape.head_dim, self.observed, shape.longest)
        if self.rows == "window":
            # Ten float64 of a token and head.
            return 80 * shape.heads * shape.longest
        return solve_bytes(shape.heads, shape.longest, shape.head_dim * shape.dtype.itemsize) if cuda else 0

    def _by_query_head(self, query: Tensor, key: Tensor) -> Tensor:
        """[B, Hkv, g, n]"""
        tokens, kv_heads = key.shape[1:3]
        observed = min(self.observed, tokens - self.sinks)
        if self.kind == "direct":
            return causal_rows(query, key, tokens - observed, tokens).sum(3)
        if self.kind == "rank_max":
            by_query, by_hub = self._visits(query, key, ("query", "uniform"), observed).unbind(2)
            return rank_max_combination(by_query, by_hub, self.sinks).unflatten(1, (kv_heads, -1))
        start = _STARTS[self.kind.removeprefix("null_")]
        visits = self._visits(query, key, (start,), observed).squeeze(2)
        if self.kind.startswith("null_"):
            null = null_model_visits(tokens, start, self.sinks, self.gamma, observed, visits.dtype, visits.device)
            if self.probability:
                alone = 1 / torch.arange(1, tokens + 1, dtype=null.dtype, device=null.device)
                null = visit_probabilities(null, alone, self.sinks, self.gamma)
            visits = visits / null
        return visits.unflatten(1, (kv_heads, -1))

    def _visits(self, query: Tensor, key: Tensor, starts: tuple[str, ...], observed: int) -> Tensor:
        """[B, H, k, n] for k starts, from the attention of query [B, n, H, D] and key [B, n, Hkv, D]."""
        if self.rows == "window":
            given = (self.sinks, self.gamma, observed)
            return torch.stack([window_chain_scores(query, key, start, *given) for start in starts], 2)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        return blocked_chain_scores(
            query, key, None, starts, self.sinks, self.gamma, observed, self.temperature, probability=self.probability
        )


__all__ = [
    "CircuitKV",
    "absorbing_chain_scores",
    "batched_walk_simulation",
    "causal_influence_walk",
    "compute_importance_scores",
    "compute_transition_matrix",
    "effective_resistance_scores",
    "landmark_absorbing_scores",
    "landmark_walks",
    "personalized_pagerank_scores",
    "select_top_k_tokens",
    "simulate_walks",
    "visit_probabilities",
]
