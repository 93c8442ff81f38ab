"""One kv head of a trace with all logits of its test queries, and attention that replaces some of them.

Every variant of the tail estimate is a table of logits over the indexed tokens: a retrieved token has its own, a token
that is left out has -inf, one that its cluster stands for has the logit of the centroid (s exp(q c) times the mean of s
values is exp(q c) times their sum), a drawn one has its own plus the log of its weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cache_hub.clusters import ClusterCounts, Clusters, cluster_keys

from .traces import LayerTrace

SINKS, WINDOW = 4, 64
LEAST_INDEXED = 16
RETRIEVAL_BUDGET, ESTIMATION_BUDGET = 0.018, 0.232
# As cache_hub.tail: tokens of a segment, rounds of k-means.
_TOKENS_PER_SEGMENT, _ITERATIONS = 8192, 5


@dataclass(frozen=True)
class ClusterRule:
    """How the indexed tokens are clustered.

    kind "wave": spherical, the number RetroInfer takes for the prompt (16 tokens each) and 10 rounds. "metric":
    CentroidTail's, `tokens` each, the metric of the last `window` prompt queries, all of them where it is None.
    "euclidean": the same under the plain distance.
    """

    kind: str
    tokens: int = 16
    window: int | None = None

    @property
    def name(self) -> str:
        if self.kind == "wave":
            return "wave clusters of 16"
        if self.kind == "euclidean":
            return f"Euclidean clusters of {self.tokens}"
        return f"clusters of {self.tokens}, metric of {self.window or 'all'} queries"


@dataclass(frozen=True)
class Outcome:
    """What a variant gives: outputs [g, T, d], T = t or a multiple of it; tokens attended to exactly and clusters that
    stand for others, per kv head and query; notes: means of what else it tells."""

    outputs: Tensor
    tokens: float
    clusters: float = 0.0
    notes: dict[str, float] = field(default_factory=dict)


class ExactHead:
    """A kv head: static tokens, indexed keys and values [N, d], prompt queries [g, n, d], all float32.

    queries [g, t, d]: the test queries over sqrt(d); logits [g, t, N] of the indexed tokens. log_u [draws, g, N]: logs
    of uniform numbers, those of [:, 0] are the ones that a group shares.
    """

    def __init__(self, trace: LayerTrace, head: int, log_u: Tensor) -> None:
        keys, values = trace.keys[head].float(), trace.values[head].float()
        self.length = len(keys)
        indexed = slice(SINKS, self.length - WINDOW)
        static = torch.cat((torch.arange(SINKS), torch.arange(self.length - WINDOW, self.length)))
        self.keys, self.values = keys[indexed], values[indexed]
        self.prompt_queries = trace.queries[head].float()
        self.queries = trace.tests[head].float() * keys.shape[1] ** -0.5
        self.logits = self.queries @ self.keys.T
        self.static_logits, self._static_values = self.queries @ keys[static].T, values[static]
        self.log_u = log_u
        self._clusters: dict[ClusterRule, Clusters] = {}

    def attend(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [g, t, d] of attention to the static tokens and, with logits [g, t, N], the indexed ones; the weights
        [g, t, N] of the latter."""
        weights = torch.cat((self.static_logits, logits), -1).softmax(-1)
        static, indexed = weights.split([SINKS + WINDOW, logits.shape[-1]], -1)
        return static @ self._static_values + indexed @ self.values, indexed

    def best(self, count: int) -> Tensor:
        """[g, t, N] bool: each query head's `count` tokens of largest logit."""
        ids = self.logits.topk(min(count, self.logits.shape[-1]), -1).indices
        return torch.zeros_like(self.logits, dtype=torch.bool).scatter_(-1, ids, True)

    def clusters(self, rule: ClusterRule) -> Clusters:
        """The clusters of the indexed tokens, one row; made once."""
        if rule not in self._clusters:
            self._clusters[rule] = self._cluster(rule)
        return self._clusters[rule]

    def _cluster(self, rule: ClusterRule) -> Clusters:
        keys, values = self.keys[None], self.values[None]
        if rule.kind == "wave":
            counts = self.wave_counts()
            return cluster_keys(keys, values, counts.segments, counts.centroids)
        segments = max(round(len(self.keys) / _TOKENS_PER_SEGMENT), 1)
        number = max(len(self.keys) // (rule.tokens * segments), 1) * segments
        if rule.kind == "euclidean":
            moment = torch.eye(keys.shape[2])
        else:
            queries = self.prompt_queries[:, -(rule.window or 0) :].flatten(0, 1)
            moment = queries.T @ queries / len(queries)
        return cluster_keys(keys, values, segments, number, _ITERATIONS, moment[None])

    def wave_counts(
        self, retrieval_budget: float = RETRIEVAL_BUDGET, estimation_budget: float = ESTIMATION_BUDGET
    ) -> ClusterCounts:
        return ClusterCounts.for_length(self.length, retrieval_budget, estimation_budget)


def tokens_read(attended: Tensor) -> float:
    """Static tokens and the union over the group of attended [g, t, N] or [t, N] bool; mean over the queries."""
    union = attended.any(0) if attended.dim() == 3 else attended
    return SINKS + WINDOW + union.sum(-1).double().mean().item()
