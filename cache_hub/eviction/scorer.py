"""What the methods of eviction have in common: a score for each token of a prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from config import RetroInferConfig

    from ..memory import RunShape

Reduction = Literal["mean", "max"]
Pooling = Literal["max", "average", "none"]


@dataclass(frozen=True)
class Scorer(ABC):
    """Ranks the tokens of a prompt for each kv head. The first `sinks` and the last `window` are kept whatever they
    score."""

    sinks: int
    window: int
    # Whether generated tokens push others out, so that a layer never holds more than its budget.
    evicts_while_decoding: ClassVar[bool] = False
    # Whether `priority` reads the attention that tokens have had, of the prompt's queries (`score`) and those since.
    sums_attention: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def of(cls, settings: RetroInferConfig) -> Scorer:
        """As configured."""

    @abstractmethod
    def score(self, query: Tensor, key: Tensor) -> Tensor:
        """[B, Hkv, n] float32, the more the better. query [B, n, H, D] and key [B, n, Hkv, D] of the whole prompt,
        rotated; n > sinks + window. What the tokens score that are always kept does not count."""

    def capacity(self, budget: int, layer: int, layers: int, tokens: int) -> int:
        """How many of a prompt's tokens layer `layer` of `layers` keeps; tokens > budget."""
        return budget

    def scratch_bytes(self, shape: RunShape, cuda: bool) -> int:
        """Of a layer's longest prompt at least, beside its states, while it is scored."""
        return 0

    def priority(self, positions: Tensor, mass: Tensor) -> Tensor:
        """[B, Hkv, C]: the kept token of which it is least is the next to go. positions int32 of the tokens in their
        sequences, mass float32: the attention that each has had, 0 without
        `sums_attention`."""
        raise NotImplementedError(f"{type(self).__name__} keeps what is generated")


def over_group(scores: Tensor, reduction: Reduction) -> Tensor:
    """[B, Hkv, n] of scores [B, Hkv, g, n]: one set of tokens is kept for the query heads that share a kv head."""
    return scores.mean(2) if reduction == "mean" else scores.amax(2)


def pooled(scores: Tensor, size: int, pooling: Pooling) -> Tensor:
    """scores [B, Hkv, n], each with those of the `size` tokens around it, so that neighbours are kept together."""
    if pooling == "max":
        return F.max_pool1d(scores, size, 1, size // 2)
    return F.avg_pool1d(scores, size, 1, size // 2) if pooling == "average" else scores
