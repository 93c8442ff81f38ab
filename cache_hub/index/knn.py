"""Exact nearest-key search for building: causal query -> key lists and key -> key lists, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .base import pad_topk

# A triangle of this many queries is masked instead of being split further.
_LEAF = 256

# (queries [m, D], keys [n, D], k <= n) -> (scores [m, k] float32, ids [m, k] int64), best first
Knn = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _knn_torch(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, ids = (queries @ keys.T).topk(k)
    return scores, ids


def _knn_faiss(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss

    scores, ids = faiss.knn(queries.numpy(), keys.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(scores), torch.from_numpy(ids.astype(np.int64, copy=False))


def choose_backend(name: str, device: torch.device) -> Knn:
    """The exact k-nearest-neighbour function of `name`: "faiss" (CPU), "torch" (matmul + top-k on the queries' device)
    or "auto" (faiss on a CPU, torch on a GPU). Raises ValueError for another name or faiss on a GPU."""
    if name == "auto":
        name = "faiss" if device.type == "cpu" else "torch"
    if name == "faiss" and device.type != "cpu":
        raise ValueError(f"knn_backend: got 'faiss' for states on {device}, allowed there: 'auto', 'torch'")
    backends = {"faiss": _knn_faiss, "torch": _knn_torch}
    if name not in backends:
        raise ValueError(f"knn_backend: got {name!r}, allowed: 'auto', 'faiss', 'torch'")
    return backends[name]


class _TopK:
    """Running best k of every query, [m, k], merged in place."""

    def __init__(self, m: int, k: int, device: torch.device) -> None:
        self.k = k
        self.scores = torch.full((m, k), float("-inf"), device=device)
        self.ids = torch.full((m, k), -1, dtype=torch.int64, device=device)

    def merge(self, rows: slice, scores: Tensor, ids: Tensor) -> None:
        best, at = torch.cat((self.scores[rows], scores), dim=1).topk(self.k)
        self.ids[rows] = torch.cat((self.ids[rows], ids), dim=1).gather(1, at)
        self.scores[rows] = best


def _causal_block(queries: Tensor, keys: Tensor, visible: Tensor, k: int, knn: Knn) -> Tensor:
    """Lists [m, k] of one block; query i sees keys 0..visible[i] - 1, visible ascending.

    Splits the staircase into rectangles for `knn` and small masked triangles, so that nothing is computed twice and
    little beyond the mask.
    """
    top = _TopK(len(queries), k, queries.device)
    counts = visible.tolist()

    def rectangle(rows: slice, begin: int, end: int) -> None:
        if end > begin:
            scores, ids = knn(queries[rows], keys[begin:end], min(k, end - begin))
            top.merge(rows, scores, ids + begin)

    def staircase(first: int, last: int, begin: int) -> None:
        rows, shared, end = slice(first, last), max(counts[first], begin), counts[last - 1]
        rectangle(rows, begin, shared)
        if end <= shared:
            return
        if last - first <= _LEAF:
            scores = queries[rows] @ keys[shared:end].T
            hidden = torch.arange(shared, end, device=keys.device) >= visible[rows, None]
            scores, ids = scores.masked_fill_(hidden, float("-inf")).topk(min(k, end - shared))
            top.merge(rows, scores, ids + shared)
            return
        middle = (first + last) // 2
        staircase(first, middle, shared)
        staircase(middle, last, shared)

    staircase(0, len(counts), 0)
    return top.ids.masked_fill_(top.scores == float("-inf"), -1)


def causal_knn(
    keys: Tensor, queries: Tensor, positions: Tensor | None, k: int, block: int = 4096, backend: str = "auto"
) -> Tensor:
    """Exact k nearest keys by inner product for every query, among the keys it may see.

    keys [R, N, D], queries [R, g, M, D] (any float dtype; computed in float32 on the queries' device), positions [M]
    as in TokenIndex.build. Returns [R, g, M, k] int32 on the CPU, best first, -1 pads. `block` queries are worked on at
    a time; scores for block x N are never held at once by the faiss backend.
    """
    rows, n, _ = keys.shape
    group, m = queries.shape[1:3]
    device = queries.device
    knn = choose_backend(backend, device)
    visible = torch.full((m,), n, device=device) if positions is None else (positions.to(device) + 1).clamp(0, n)
    lists = torch.empty(rows, group, m, k, dtype=torch.int32)
    for r in range(rows):
        row_keys = keys[r].to(device, torch.float32).contiguous()
        for h in range(group):
            for begin in range(0, m, block):
                part = slice(begin, min(begin + block, m))
                block_queries = queries[r, h, part].float().contiguous()
                lists[r, h, part] = _causal_block(block_queries, row_keys, visible[part], k, knn).int()
    return lists


def key_knn(keys: Tensor, k: int, block: int = 4096, backend: str = "auto") -> Tensor:
    """The k nearest other keys of every key by cosine after subtracting the mean key.

    keys [R, N, D]; computed in float32 on their device. Returns [R, N, min(k, N - 1)] int32 on the CPU, best first.
    """
    rows, n, _ = keys.shape
    k = min(k, n - 1)
    lists = torch.empty(rows, n, k, dtype=torch.int32)
    if k == 0:
        return lists
    knn = choose_backend(backend, keys.device)
    own = torch.arange(n, device=keys.device)[:, None]
    for r in range(rows):
        centred = keys[r].float()
        centred = torch.nn.functional.normalize(centred - centred.mean(0), dim=1).contiguous()
        for begin in range(0, n, block):
            part = slice(begin, min(begin + block, n))
            _, ids = knn(centred[part], centred, k + 1)
            # A key is its own neighbour; among exact duplicates it may not be the first, or not even listed.
            keep = ids != own[part]
            keep[:, -1] &= ~keep.all(dim=1)
            lists[r, part] = ids[keep].view(-1, k).int()
    return lists


def exact_topk(keys: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k of keys [R, N, D] for queries [R, g, D] by inner product in float32.

    Returns scores [R, g, k] float32 and ids [R, g, k] int32, best first, -inf / -1 pads.
    """
    scores, ids = (queries.float() @ keys.float().transpose(1, 2)).topk(min(k, keys.shape[1]))
    return pad_topk(scores, ids.int(), k)
