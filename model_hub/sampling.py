"""How the next token is drawn from the logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """Greedy when `do_sample` is false; otherwise draws, with torch's global generator, from softmax(logits /
    temperature) cut to the `top_k` best (0: no cut) and then to the smallest set that holds `top_p` of the mass.

    Raises ValueError for values outside temperature > 0, 0 < top_p <= 1, top_k >= 0.
    """

    do_sample: bool = False
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (no cut) or more, got {self.top_k}")

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [B, V] float32 -> token ids [B] int64."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        count = min(self.top_k or logits.shape[-1], logits.shape[-1])
        best, ids = (logits / self.temperature).topk(count, dim=-1)
        probabilities = best.softmax(dim=-1)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= self.top_p, 0.0)
        return ids.gather(-1, torch.multinomial(probabilities, 1)).squeeze(-1)
