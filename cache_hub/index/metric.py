"""The metric of attention: how much the logits of two keys differ, over the queries of late prompt positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .base import lift

# Last prompt queries of each head, which decode queries resemble most.
LATE_QUERIES = 512


def query_moment(queries: Tensor) -> Tensor:
    """The mean of q q^T over the last queries of queries [R, g, M, D], all g heads together: [R, D, D] float32 on their
    device. x^T E[q q^T] x is the mean square by which the logits of two keys that are x apart differ."""
    late = queries[:, :, -LATE_QUERIES:].flatten(1, 2).float()
    return late.transpose(1, 2) @ late / late.shape[1]


def square_root(moments: Tensor, ridge: float = 1e-4) -> Tensor:
    """A [R, D, D] with A A^T = moments [R, D, D] + `ridge` times their mean diagonal in every direction, so that
    none is lost."""
    size = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    values, vectors = torch.linalg.eigh(moments + ridge * size * torch.eye(moments.shape[1], device=moments.device))
    return vectors * values.clamp(min=0).sqrt()[:, None]


@dataclass(frozen=True)
class KeyMetric:
    """What a graph keeps of its build to tell which keys are near: mean [R, D] of the keys and root [R, D, D] of
    square_root, None for the plain cosine; float32, on the CPU. D is one more where keys have a dimension `extra`."""

    mean: Tensor
    root: Tensor | None

    @classmethod
    def of(cls, keys: Tensor, extra: Tensor | None, root: Tensor | None) -> KeyMetric:
        """From all keys [R, N, D] on the CPU, and extra [R, N]."""
        mean = torch.stack([row.mean(0, dtype=torch.float32) for row in keys])
        return cls(mean if extra is None else lift(mean, extra.mean(1)), root)

    @cached_property
    def form(self) -> Tensor | None:
        """root root^T [R, D, D], contiguous."""
        return None if self.root is None else self.root @ self.root.transpose(1, 2)

    def towards(self, states: Tensor) -> Tensor:
        """For keys [R, n, D] float32 those vectors [R, n, D] whose inner products with other keys are, but for the same
        number, the metric's inner products with them."""
        centred = states - self.mean[:, None]
        return centred if self.form is None else centred @ self.form

    def reciprocals(self, states: Tensor) -> Tensor:
        """1 / length in the metric [R, n] of keys [R, n, D] float32 less the mean; 0 where hardly any is left."""
        centred = states - self.mean[:, None]
        lengths = (centred if self.root is None else centred @ self.root).norm(dim=2)
        return torch.where(lengths > 1e-6 * lengths.amax(1, keepdim=True), 1 / lengths, 0.0)

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + (0 if self.root is None else self.root.nbytes)
