"""What computes exact neighbour lists: native code and faiss on a CPU, Triton kernels on a GPU, torch on both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from . import _native
from .base import lift, pad_topk
from .native_knn import is_faster, native_topk

# Queries whose shared keys faiss scans at once; the keys that only some of them see are scanned one by one.
_STAIR = 256
# Keys whose best score torch compares first: the k chunks of highest maximum hold the exact top k.
_CHUNK = 32
# One more dimension of the keys [n] and of the queries [m], float32.
Beside: TypeAlias = "tuple[Tensor, Tensor] | None"


def choose_backend(name: str, device: torch.device) -> str:
    """ "native" or "faiss" (CPU), "triton" (GPU) or "torch" (matmul and top-k on the states' device); "auto" is triton
    on a GPU, on a CPU native where it has the instructions for it and faiss elsewhere.

    Raises ValueError for another name, or one that does not work on the device.
    """
    fitting = ("native", "faiss", "torch") if device.type == "cpu" else ("triton", "torch")
    if name == "auto":
        return "faiss" if device.type == "cpu" and not is_faster() else fitting[0]
    if name not in BACKENDS:
        raise ValueError(f"knn_backend: got {name!r}, allowed: {_quoted(BACKENDS)}")
    if name not in fitting:
        raise ValueError(f"knn_backend: got {name!r} for states on {device}, allowed there: {_quoted(fitting)}")
    return name


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, ("auto", *names)))


def _faiss_topk(keys: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores [m, k] float32 and ids [m, k] int64 of the nearest of keys [n, D], k <= n, for queries [m, D]."""
    import faiss

    scores, ids = faiss.knn(queries.numpy(), keys.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(scores), torch.from_numpy(ids.astype(np.int64, copy=False))


def _by_native(keys: Tensor, queries: Tensor, visible: Tensor, k: int, beside: Beside) -> Tensor:
    return native_topk(keys, queries, visible, k, beside)[0]


def _by_triton(keys: Tensor, queries: Tensor, visible: Tensor, k: int, beside: Beside) -> Tensor:
    from .streaming_topk import streaming_topk  # Triton only where it is used

    return streaming_topk(keys, queries, visible.int(), k, beside)


def _by_torch(keys: Tensor, queries: Tensor, visible: Tensor, k: int, beside: Beside) -> Tensor:
    seen = int(visible[-1])
    if not seen:
        return torch.full((len(queries), k), -1, dtype=torch.int32, device=keys.device)
    keys, queries = _lifted(keys[:seen], queries, beside)
    best, ids = pad_topk(*_chunked_topk(queries, keys, visible, min(k, seen)), k)
    return ids.masked_fill_(best == float("-inf"), -1).int()


def _lifted(keys: Tensor, queries: Tensor, beside: Beside) -> tuple[Tensor, Tensor]:
    """Both as wide as they are together with what is beside them."""
    if beside is None:
        return keys, queries
    return lift(keys, beside[0][: len(keys)]), lift(queries, beside[1])


def _chunked_topk(queries: Tensor, keys: Tensor, visible: Tensor | int, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k <= n by inner product of queries [m, D] over the first `visible` ([m] or one number) of keys [n, D]:
    scores [m, k], -inf where fewer are visible, and ids [m, k] int64."""
    width = -(-len(keys) // _CHUNK) * _CHUNK
    scores = queries @ torch.nn.functional.pad(keys, (0, 0, 0, width - len(keys))).T
    hidden_from = int(visible[0]) if isinstance(visible, Tensor) else visible
    if hidden_from < width:
        limits = visible.to(keys.device)[:, None] if isinstance(visible, Tensor) else visible
        tail = torch.arange(hidden_from, width, device=keys.device)
        scores[:, hidden_from:].masked_fill_(tail >= limits, float("-inf"))
    chunks = scores.view(len(queries), -1, _CHUNK)
    if chunks.shape[1] <= k:
        best, ids = scores.topk(k)
        return best, ids
    top = chunks.amax(2).topk(k, sorted=False).indices
    best, at = chunks.gather(1, top[:, :, None].expand(-1, -1, _CHUNK)).flatten(1).topk(k)
    return best, top.gather(1, at // _CHUNK) * _CHUNK + at % _CHUNK


def _by_faiss(keys: Tensor, queries: Tensor, visible: Tensor, k: int, beside: Beside) -> Tensor:
    """faiss scans what a stair of queries sees together, native code the triangle that is left."""
    keys, queries = _lifted(keys, queries, beside)
    m, dim = queries.shape
    scores = torch.full((m, k), float("-inf"))
    ids = torch.full((m, k), -1, dtype=torch.int32)
    store = _native.KeyStore(keys.data_ptr(), 0, 1, len(keys), dim, keys.numel(), dim)
    counts = visible.to(torch.int64).contiguous()
    step = m if counts[0] == counts[-1] else _STAIR
    for begin in range(0, m, step):
        stair = slice(begin, min(begin + step, m))
        shared = int(counts[begin])
        if shared:
            width = min(k, shared)
            best, found = _faiss_topk(keys[:shared], queries[stair], width)
            scores[stair, :width] = best
            ids[stair, :width] = found.int()
        _native.extend(
            store,
            queries[stair].data_ptr(),
            counts[stair].data_ptr(),
            stair.stop - begin,
            shared,
            k,
            ids[stair].data_ptr(),
            scores[stair].data_ptr(),
        )
    return ids


# Each takes keys [n, D] and queries [m, D], float32 with contiguous rows (triton: of one type; native: keys of any),
# visible [m] on the CPU, non-decreasing (triton: on the GPU, in any order), k and Beside. Returns lists [m, k] int32 on
# the queries' device, best first, -1 pads: query i sees the keys 0..visible[i] - 1.
BACKENDS = {"native": _by_native, "faiss": _by_faiss, "triton": _by_triton, "torch": _by_torch}
