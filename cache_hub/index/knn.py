"""Exact nearest-key search for building: causal query -> key lists and key -> key lists, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import _native
from .base import lift, pad_topk

# Keys that one task looks up at once: enough for full speed, few enough that all threads end together.
_KEY_BLOCK = 1024
# Queries whose shared keys faiss scans at once; the keys that only some of them see are scanned one by one.
_STAIR = 256
# Keys whose best score torch compares first: the k chunks of highest maximum hold the exact top k.
_CHUNK = 32


def choose_backend(name: str, device: torch.device) -> str:
    """ "faiss" (CPU), "triton" (GPU) or "torch" (matmul and top-k on the states' device); "auto" is faiss on a CPU and
    triton on a GPU.

    Raises ValueError for another name, or one that does not work on the device.
    """
    fitting = "faiss" if device.type == "cpu" else "triton"
    if name == "auto":
        return fitting
    if name not in ("faiss", "triton", "torch"):
        raise ValueError(f"knn_backend: got {name!r}, allowed: 'auto', 'faiss', 'triton', 'torch'")
    if name not in (fitting, "torch"):
        raise ValueError(
            f"knn_backend: got {name!r} for states on {device}, allowed there: 'auto', {fitting!r}, 'torch'"
        )
    return name


def causal_knn(
    keys: Tensor,
    queries: Tensor,
    positions: Tensor | None,
    k: int,
    block: int = 4096,
    backend: str = "auto",
    num_threads: int | None = None,
    extra: Tensor | None = None,
) -> Tensor:
    """Exact k nearest keys by inner product for every query, among the keys it may see.

    keys [R, N, D], queries [R, g, M, D] (any float dtype; computed in float32 on the queries' device), positions [M]
    and extra [R, N] as in TokenIndex.build. Returns [R, g, M, k] int32 on the queries' device, best first, -1 pads.
    A thread works on `block` queries at a time; beside them it holds their lists, and with the torch backend their
    scores, block x N. triton takes eight times `block`, for which it holds a quarter of that.
    """
    rows, n, _ = keys.shape
    group, m = queries.shape[1:3]
    device = queries.device
    chosen = choose_backend(backend, device)
    causal = {"faiss": _causal_faiss, "triton": _causal_triton, "torch": _causal_torch}[chosen]
    visible = torch.full((m,), n) if positions is None else (positions.cpu() + 1).clamp(0, n)
    exact_in_short = chosen == "triton" and keys.dtype == queries.dtype
    dtype = keys.dtype if exact_in_short else torch.float32
    block = 8 * block if chosen == "triton" else block
    keys = keys.to(device, dtype).contiguous()
    lists = torch.empty(rows, group, m, k, dtype=torch.int32, device=device)
    split = chosen == "triton" and extra is not None
    beside = extra.to(device).contiguous() if extra is not None else keys.new_zeros(rows, 0)
    if extra is not None and not split:
        keys, queries = lift(keys, beside), lift(queries, 1.0)

    def work(r: int, h: int, begin: int) -> None:
        part = slice(begin, min(begin + block, m))
        asked = queries[r, h, part].to(dtype).contiguous()
        more = [(beside[r], torch.ones(len(asked), device=device))] if split else []
        lists[r, h, part] = causal(keys[r], asked, visible[part], k, *more)

    tasks = [(r, h, begin) for r in range(rows) for h in range(group) for begin in range(0, m, block)]
    in_parallel(work, tasks, device, num_threads)
    return lists


def key_knn(
    keys: Tensor,
    k: int,
    block: int = 4096,
    backend: str = "auto",
    num_threads: int | None = None,
    extra: Tensor | None = None,
    root: Tensor | None = None,
) -> Tensor:
    """The k nearest other keys of every key by cosine after subtracting the mean key.

    keys [R, N, D], extra [R, N] one more dimension; computed in float32 on their device. root [R, D, D], or D + 1 with
    extra: the cosine is that of the keys times root, see metric.square_root. Returns on the keys' device
    [R, N, min(k, N - 1)] int32, best first.
    """
    rows, n, _ = keys.shape
    k = min(k, n - 1)
    lists = torch.empty(rows, n, k, dtype=torch.int32, device=keys.device)
    if k == 0:
        return lists
    chosen = choose_backend(backend, keys.device)
    nearest = {"faiss": _nearest_faiss, "triton": _nearest_triton, "torch": _nearest_torch}[chosen]
    block = {"faiss": min(block, _KEY_BLOCK), "triton": 8 * block, "torch": block}[chosen]
    states = keys.float() if extra is None else lift(keys, extra)
    centred = states - states.mean(1, keepdim=True)
    centred = normalize(centred if root is None else centred @ root.to(centred), dim=2).contiguous()
    split = chosen == "triton" and extra is not None
    beside = centred[..., -1].contiguous()
    if split:
        centred = centred[..., :-1].contiguous()

    def work(r: int, begin: int) -> None:
        part = torch.arange(begin, min(begin + block, n), device=keys.device)
        more = [(beside[r], beside[r, part])] if split else []
        ids = nearest(centred[r], centred[r, part], k + 1, *more)
        # A key is its own neighbour; among exact duplicates it may not be the first, or not even listed.
        keep = ids != part[:, None]
        keep[:, -1] &= ~keep.all(dim=1)
        lists[r, begin : begin + len(part)] = ids[keep].view(-1, k)

    in_parallel(work, [(r, begin) for r in range(rows) for begin in range(0, n, block)], keys.device, num_threads)
    return lists


def exact_topk(keys: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k of keys [R, N, D] for queries [R, g, D] by inner product in float32.

    Returns scores [R, g, k] float32 and ids [R, g, k] int32, best first, -inf / -1 pads.
    """
    scores, ids = (queries.float() @ keys.float().transpose(1, 2)).topk(min(k, keys.shape[1]))
    return pad_topk(scores, ids.int(), k)


def in_parallel(
    work: Callable[..., None], tasks: Iterable[tuple[Any, ...]], device: torch.device, threads: int | None
) -> None:
    """Calls work(*task) for every task: one after another for states on a GPU, else by `threads` threads (None:
    torch's count), with faiss at one thread in each. The first error of a task is raised when its turn comes."""
    if device.type != "cpu":
        for task in tasks:
            work(*task)
        return
    import faiss

    # faiss multiplies matrices only from this many query elements on (128,000: far above a block that pays already).
    threshold = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 0
    # Threads of a pool do not inherit the mode, without which they may not write what was made in it.
    work = torch.inference_mode()(work)
    pool = _pool(threads or torch.get_num_threads())
    try:
        running = [pool.submit(work, *task) for task in tasks]
        wait(running)
        for done in running:
            done.result()
    finally:
        faiss.cvar.distance_compute_blas_threshold = threshold


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads kept for the process, since starting them takes longer than a search, with one OpenMP thread in each:
    many short parallel regions wait for one another, worst where cores are shared."""
    import faiss

    return ThreadPoolExecutor(workers, initializer=faiss.omp_set_num_threads, initargs=(1,))


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)


def _faiss_topk(keys: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores [m, k] float32 and ids [m, k] int64 of the nearest of keys [n, D], k <= n, for queries [m, D]."""
    import faiss

    scores, ids = faiss.knn(queries.numpy(), keys.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(scores), torch.from_numpy(ids.astype(np.int64, copy=False))


def _nearest_faiss(keys: Tensor, queries: Tensor, k: int) -> Tensor:
    """Ids [m, k] of the nearest of keys [n, D], k <= n, for queries [m, D], float32."""
    return _faiss_topk(keys, queries, k)[1]


def _nearest_torch(keys: Tensor, queries: Tensor, k: int) -> Tensor:
    """As _nearest_faiss, on any device."""
    return _chunked_topk(queries, keys, len(keys), k)[1]


def _nearest_triton(keys: Tensor, queries: Tensor, k: int, beside: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """As _nearest_faiss, on a GPU; beside as in streaming_topk."""
    return _causal_triton(keys, queries, torch.full((len(queries),), len(keys)), k, beside)


def _causal_triton(
    keys: Tensor, queries: Tensor, visible: Tensor, k: int, beside: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """As _causal_torch, for keys and queries of one dtype; beside as in streaming_topk."""
    from .streaming_topk import streaming_topk  # Triton only where it is used

    seen = int(visible[-1])
    if not seen:
        return torch.full((len(queries), k), -1, dtype=torch.int32, device=keys.device)
    return streaming_topk(keys[:seen], queries, visible.to(keys.device, torch.int32), k, beside)


def _causal_torch(keys: Tensor, queries: Tensor, visible: Tensor, k: int) -> Tensor:
    """Lists [m, k] int32, -1 pads; query i of [m, D] sees keys 0..visible[i] - 1 of [n, D], visible [m] on the CPU."""
    seen = int(visible[-1])
    if not seen:
        return torch.full((len(queries), k), -1, dtype=torch.int32, device=keys.device)
    best, ids = pad_topk(*_chunked_topk(queries, keys[:seen], visible, min(k, seen)), k)
    return ids.masked_fill_(best == float("-inf"), -1).int()


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


def _causal_faiss(keys: Tensor, queries: Tensor, visible: Tensor, k: int) -> Tensor:
    """As _causal_torch: faiss scans what a stair of queries sees together, native code the triangle that is left."""
    m, dim = queries.shape
    scores = torch.full((m, k), float("-inf"))
    ids = torch.full((m, k), -1, dtype=torch.int32)
    store = _native.KeyStore(keys.data_ptr(), 0, 1, len(keys), dim, keys.numel(), dim)
    counts = visible.to(torch.int64).contiguous()
    for begin in range(0, m, _STAIR):
        stair = slice(begin, min(begin + _STAIR, m))
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
