"""Exact nearest-key search for building: causal query -> key lists and key -> key lists, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import lift, pad_topk
from .knn_backends import BACKENDS, choose_backend

# Keys that faiss looks up in one task: enough for full speed, few enough that all threads end together.
_KEY_BLOCK = 1024
# Queries of one task of the native code: packing the keys costs little beside them, their candidates are in the caches.
_NATIVE_BLOCK = 2048
# Last prompt queries of each head that are listed whatever the stride: links follow the latest lists, entries the last.
ALWAYS_LISTED = 4096


def causal_knn(
    keys: Tensor,
    queries: Tensor,
    positions: Tensor | None,
    k: int,
    block: int = 4096,
    backend: str = "auto",
    num_threads: int | None = None,
    extra: Tensor | None = None,
    stride: int = 1,
) -> Tensor:
    """Exact k nearest keys by inner product for the queries that listed_queries names, among the keys each may see.

    keys [R, N, D], queries [R, g, M, D] (any float dtype; computed in float32 on the queries' device), positions [M]
    and extra [R, N] as in TokenIndex.build. Returns [R, g, M', k] int32 on the queries' device, best first, -1 pads,
    for M' = M queries where stride is 1.
    A thread works on `block` queries at a time; beside them it holds their lists, and with the torch backend their
    scores, block x N. native takes at most 2048, for which it holds what native_topk says. triton takes all g x M' of a
    row, of which it makes a copy where M' < M or keys have another type, and holds what streaming_topk says.
    """
    rows, n, dim = keys.shape
    group, asked_of = queries.shape[1:3]
    device = queries.device
    listed = None if stride == 1 else listed_queries(asked_of, stride)
    m = asked_of if listed is None else len(listed)
    backend = choose_backend(backend, device)
    on_gpu = backend == "triton"
    lists_of, block = BACKENDS[backend], max(m, 1) if on_gpu else _block(backend, block)
    heads_at_once = group if on_gpu else 1
    where = device if on_gpu else torch.device("cpu")
    visible = torch.full((asked_of,), n, device=where) if positions is None else (positions.to(where) + 1).clamp(0, n)
    if listed is not None:
        visible, listed = visible[listed.to(where)], listed.to(device)
    dtype = keys.dtype if on_gpu and keys.dtype == queries.dtype else torch.float32
    # The native code reads the store as it is.
    keys = keys.to(device) if backend == "native" else keys.to(device, dtype).contiguous()
    held = None if extra is None else extra.to(device, torch.float32).contiguous()
    lists = torch.empty(rows, group, m, k, dtype=torch.int32, device=device)

    def work(r: int, head: int, begin: int) -> None:
        heads, part = slice(head, head + heads_at_once), slice(begin, min(begin + block, m))
        chosen = queries[r, heads, part] if listed is None else queries[r, heads].index_select(1, listed[part])
        asked = chosen.to(dtype).reshape(-1, dim).contiguous()
        beside = None if held is None else (held[r], torch.ones(len(asked), device=device))
        found = lists_of(keys[r], asked, visible[part].repeat(heads_at_once), k, beside)
        lists[r, heads, part] = found.view(heads_at_once, -1, k)

    tasks = [
        (r, head, begin) for r in range(rows) for head in range(0, group, heads_at_once) for begin in range(0, m, block)
    ]
    in_parallel(work, tasks, device, num_threads)
    return lists


def listed_queries(queries: int, stride: int) -> Tensor:
    """Which of so many prompt queries get a list: [M'] int64 on the CPU, ascending. The last ALWAYS_LISTED all do, of
    those before every stride-th, counted from the end."""
    back = torch.arange(queries - 1, -1, -1)
    return ((back < ALWAYS_LISTED) | (back % stride == 0)).nonzero().flatten()


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
    backend = choose_backend(backend, keys.device)
    on_gpu = backend == "triton"
    lists_of, block = BACKENDS[backend], n if on_gpu else _block(backend, block, _KEY_BLOCK)
    split = extra is not None and on_gpu  # whose tiles would be twice as wide
    where = keys.device if on_gpu else torch.device("cpu")

    def work(begin: int) -> None:
        part = torch.arange(begin, min(begin + block, n), device=keys.device)
        beside = None if held is None else (held, held[part])
        ids = lists_of(centred, centred[part], torch.full((len(part),), n, device=where), k + 1, beside)
        # A key is its own neighbour; among exact duplicates it may not be the first, or not even listed.
        keep = ids != part[:, None]
        keep[:, -1] &= ~keep.all(dim=1)
        lists[r, begin : begin + len(part)] = ids[keep].view(-1, k)

    # Row by row: in float32 the vectors, and what they are made of, take several times the keys' bytes.
    for r in range(rows):
        own = slice(r, r + 1)
        centred = directions(keys[own], None if extra is None else extra[own], None if root is None else root[own])[0]
        held = None
        if split:
            centred, held = centred[:, :-1].contiguous(), centred[:, -1].contiguous()
        in_parallel(work, [(begin,) for begin in range(0, n, block)], keys.device, num_threads)
    return lists


def directions(keys: Tensor, extra: Tensor | None = None, root: Tensor | None = None) -> Tensor:
    """[R, N, D or D + 1] float32 of length 1, whose inner products are the cosines of key_knn."""
    states = keys.float() if extra is None else lift(keys, extra)
    centred = states - states.mean(1, keepdim=True)
    return normalize(centred if root is None else centred @ root.to(centred), dim=2).contiguous()


def _block(backend: str, block: int, faiss_block: int | None = None) -> int:
    """Queries of one task."""
    return min(block, {"native": _NATIVE_BLOCK, "faiss": faiss_block or block}.get(backend, block))


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
