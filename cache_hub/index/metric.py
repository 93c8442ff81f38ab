"""The metric of attention: how much the logits of two keys differ, over the queries of late prompt positions."""

from __future__ import annotations

import torch
from torch import Tensor

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
