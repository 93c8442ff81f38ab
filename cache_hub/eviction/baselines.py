"""The methods that eviction is compared by: StreamingLLM, H2O, SnapKV, PyramidKV, as KVCache-Factory implements them.

Differences from its code: a kv head keeps one set of tokens, by scores reduced over its query heads before they are
pooled, where it repeats keys and values for each of them; softmaxes are summed in float32, not in the model's type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import causal_rows, received_mass, rows_bytes
from .scorer import Pooling, Reduction, Scorer, over_group, pooled

if TYPE_CHECKING:
    from config import RetroInferConfig

    from ..memory import RunShape


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """The sinks and the latest tokens (arXiv 2309.17453). Generated tokens push out the oldest behind the sinks. Kept
    keys keep the rotation of their places in the text, as in KVCache-Factory, not of those in the cache."""

    evicts_while_decoding: ClassVar[bool] = True

    @classmethod
    def of(cls, settings: RetroInferConfig) -> StreamingLLM:
        return cls(settings.static_pattern_start, 1)

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        batch, tokens, kv_heads, _ = key.shape
        return torch.arange(tokens, dtype=torch.float32, device=key.device).expand(batch, kv_heads, -1)

    def priority(self, positions: Tensor, mass: Tensor) -> Tensor:
        return positions.float()


@dataclass(frozen=True)
class H2O(Scorer):
    """The tokens that all queries together have attended to most, and the last `window` (arXiv 2306.14048). Generated
    tokens push out what has had the least attention so far."""

    group: Reduction
    evicts_while_decoding: ClassVar[bool] = True
    sums_attention: ClassVar[bool] = True

    @classmethod
    def of(cls, settings: RetroInferConfig) -> H2O:
        return cls(0, settings.eviction.window, settings.eviction.group)

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        return over_group(received_mass(query, key), self.group)

    def priority(self, positions: Tensor, mass: Tensor) -> Tensor:
        return mass


@dataclass(frozen=True)
class SnapKV(Scorer):
    """The tokens that the last `window` queries attend to most, pooled with their neighbours (arXiv 2404.14469)."""

    kernel_size: int
    pooling: Pooling
    group: Reduction

    @classmethod
    def of(cls, settings: RetroInferConfig) -> SnapKV:
        own = settings.eviction
        return cls(0, own.window, own.kernel_size, own.pooling, own.group)

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        tokens = key.shape[1]
        rows = causal_rows(query, key, tokens - self.window, tokens)[..., : -self.window]
        return F.pad(pooled(over_group(rows.sum(3), self.group), self.kernel_size, self.pooling), (0, self.window))

    def scratch_bytes(self, shape: RunShape, cuda: bool) -> int:
        return rows_bytes(shape.heads, shape.kv_heads, shape.head_dim, self.window, shape.longest)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with more tokens for the lower layers than for the upper ones (arXiv 2406.02069)."""

    beta: int

    @classmethod
    def of(cls, settings: RetroInferConfig) -> PyramidKV:
        own = settings.eviction
        return cls(0, own.window, own.kernel_size, own.pooling, own.group, own.pyramid_beta)

    def capacity(self, budget: int, layer: int, layers: int, tokens: int) -> int:
        mean = budget - self.window
        if tokens < 2 * mean or layers == 1:
            return budget
        least = mean // self.beta
        most = 2 * mean - least
        if most >= tokens - self.window:
            most = tokens - self.window
            least = 2 * mean - most
        return most - layer * ((most - least) // (layers - 1)) + self.window
