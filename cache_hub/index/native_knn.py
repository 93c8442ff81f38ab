"""Exact neighbour lists by the native code (csrc/nearest.h): tiles of products tell which keys can be among a query's
best, and those are scored in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from .base import lift
from .key_store import DTYPES, as_key_store


def is_faster() -> bool:
    """Whether this CPU has instructions by which the native code is faster than faiss: AMX, AVX-512 or AVX2."""
    return _native.tile_kernels()[0] != "plain"


def native_topk(
    keys: Tensor, queries: Tensor, visible: Tensor, k: int, beside: tuple[Tensor, Tensor] | None = None, kernel: int = 0
) -> tuple[Tensor, int]:
    """Lists [m, k] int32 of the nearest keys by inner product in float32, best first, equal ones by id, -1 pads.

    keys [n, D] of any float type, queries [m, D] float32, both on the CPU; query i sees the keys 0..visible[i] - 1.
    beside: one more dimension of the keys, [n] float32, and of the queries, [m]. kernel: place in
    _native.tile_kernels(); the lists are the same by each, and for any division of the queries. With the lists comes
    how many candidates were scored. Holds, for each query, max(4 k, 128) candidates of 12 bytes, and twice the query.
    """
    if keys.dtype not in DTYPES or keys.stride(1) != 1:
        keys = keys.float().contiguous()
    extra = None
    if beside is not None:
        extra, queries = beside[0][None].contiguous(), lift(queries, beside[1])
    queries, visible = queries.contiguous(), visible.to(torch.int64).contiguous()
    ids = torch.empty(len(queries), k, dtype=torch.int32)
    scored = _native.nearest(
        as_key_store(keys[None], extra),
        queries.data_ptr(),
        visible.data_ptr(),
        len(queries),
        k,
        kernel,
        ids.data_ptr(),
    )
    return ids, scored
