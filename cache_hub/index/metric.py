"""The metric of attention: how much the logits of two keys differ, over the queries of late prompt positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import lift
from .tensor_file import take

# Last prompt queries of each head, which decode queries resemble most.
LATE_QUERIES = 512
# Of which float32 copies are made at a time.
_KEYS_AT_ONCE = 1 << 14


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
        """From all keys [R, N, D], on any device, and extra [R, N] on the CPU."""
        mean = torch.stack([row.mean(0, dtype=torch.float32) for row in keys]).cpu()
        return cls(mean if extra is None else lift(mean, extra.mean(1)), root)

    @classmethod
    def taken(cls, tensors: dict[str, Tensor], rows: int, dim: int) -> KeyMetric:
        """Out of what was saved; without a root for the plain cosine, and where the build had no queries. ValueError
        for tensors that do not fit."""
        mean = take(tensors, "mean", (rows, dim), torch.float32)
        root = take(tensors, "root", (rows, dim, dim), torch.float32) if "root" in tensors else None
        for name, tensor in (("mean", mean), ("root", root)):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise ValueError(f"{name}: got NaN or infinite elements, allowed: finite ones")
        return cls(mean, root)

    @property
    def form(self) -> Tensor | None:
        """root root^T [R, D, D], contiguous."""
        return None if self.root is None else self.root @ self.root.transpose(1, 2)

    def towards(self, states: Tensor) -> Tensor:
        """For keys [R, n, D] those vectors [R, n, D] whose inner products with other keys are, but for the same
        number, the metric's inner products with them."""
        centred, form = states.float() - self.mean[:, None], self.form
        return centred if form is None else centred @ form

    def reciprocals(self, keys: Tensor, extra: Tensor | None, first: int) -> Tensor:
        """1 / length in the metric, less the mean, [R, N - first] of the keys from `first` on, of keys [R, N, d] and
        their dimension extra [R, N]; 0 for a key that is hardly another than the mean."""
        lengths = []
        for begin in range(first, keys.shape[1], _KEYS_AT_ONCE):
            some = slice(begin, begin + _KEYS_AT_ONCE)
            states = keys[:, some].float() if extra is None else lift(keys[:, some], extra[:, some])
            centred = states - self.mean[:, None]
            lengths.append((centred if self.root is None else centred @ self.root).norm(dim=2))
        all_lengths = torch.cat(lengths, 1)
        return torch.where(all_lengths > 1e-6 * all_lengths.amax(1, keepdim=True), 1 / all_lengths, 0.0)

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + (0 if self.root is None else self.root.nbytes)
