"""Exact top-k of inner products on a GPU in two passes, with 1/32 of the scores ever in memory: for any input, where
streaming_topk's first try fails.

First the best score of every run of 32 keys, by matrix products whose tiles stay on the chip; the k runs of highest
maximum hold the k best keys. Then the scores of those runs alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32
_BLOCK_C = 128
# Columns that one program holds in registers, 32 a thread.
_LARGEST_BLOCK = 16384
# Triton's interpreter cannot multiply bfloat16.
_DOTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def chunk_topk(
    keys: Tensor, queries: Tensor, visible: Tensor, k: int, beside: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """As streaming_topk. Holds m x n / 32 floats twice."""
    m, dim = queries.shape
    n = len(keys)
    blocks = {"BLOCK_D": max(triton.next_power_of_2(dim), 16), "CHUNK": CHUNK}
    # Two tiles of 32 KiB at most: they fit the shared memory of any GPU since Ampere.
    tile = min(128, max(32768 // (blocks["BLOCK_D"] * queries.element_size()), CHUNK))
    maxima = queries.new_empty(m, triton.cdiv(n, tile) * (tile // CHUNK), dtype=torch.float32)
    beside_keys, beside_queries = beside or (None, None)
    with torch.cuda.device_of(queries):
        chunk_maxima_kernel[(triton.cdiv(n, tile), triton.cdiv(m, tile))](
            queries, keys, beside_queries, beside_keys, visible, maxima, m, n, dim,
            queries.stride(0), keys.stride(0), maxima.stride(0),
            BLOCK_M=tile, BLOCK_N=tile, COMPUTE=_DOTS[queries.dtype if queries.is_cuda else torch.float32], num_warps=8,
            **blocks,
        )  # fmt: skip
        chunks = largest(maxima, min(k, maxima.shape[1]))
        scores = queries.new_empty(m, chunks.shape[1] * CHUNK, dtype=torch.float32)
        chunk_scores_kernel[(m,)](
            queries, keys, beside_queries, beside_keys, visible, chunks, scores, n, dim, chunks.shape[1],
            queries.stride(0), keys.stride(0),
            BLOCK_C=_BLOCK_C, num_warps=4, **blocks,
        )  # fmt: skip
    at = largest(scores, min(k, scores.shape[1])).long()
    best, order = scores.gather(1, at).sort(dim=1, descending=True)
    at = at.gather(1, order)
    ids = chunks.gather(1, at // CHUNK) * CHUNK + (at % CHUNK).int()
    ids.masked_fill_(best == float("-inf"), -1)
    return torch.nn.functional.pad(ids, (0, k - ids.shape[1]), value=-1)


def largest(scores: Tensor, k: int) -> Tensor:
    """Columns [m, k] int32, ascending, of the k <= w largest of scores [m, w] float32 without NaN; the first columns
    among equal ones. torch.topk selects by many passes over memory, this by one."""
    m, width = scores.shape
    out = scores.new_empty(m, k, dtype=torch.int32)
    block = triton.next_power_of_2(width)
    if block > _LARGEST_BLOCK:
        return scores.topk(k, sorted=False).indices.int().sort(1).values
    with torch.cuda.device_of(scores):
        largest_kernel[(m,)](
            scores, out, width, k, scores.stride(0), BLOCK=block, num_warps=min(max(block // 1024, 1), 16)
        )
    return out


@triton.jit(do_not_specialize=["m", "n", "stride_m"])
def chunk_maxima_kernel(  # type: ignore[no-untyped-def]
    queries, keys, beside_queries, beside_keys, visible, maxima, m, n, dim, stride_q, stride_k, stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: the maxima of BLOCK_N / CHUNK runs of keys for BLOCK_M queries, -inf where a query sees none."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    row_ok = row < m
    limit = tl.load(visible + row, mask=row_ok, other=0)
    best = tl.full([BLOCK_M, BLOCK_N // CHUNK], float("-inf"), tl.float32)
    if tl.max(limit, 0) > tl.program_id(0) * BLOCK_N:
        d_ok = d[None, :] < dim
        q = tl.load(queries + row[:, None].to(tl.int64) * stride_q + d[None, :], mask=row_ok[:, None] & d_ok, other=0.0)
        k = tl.load(
            keys + column[:, None].to(tl.int64) * stride_k + d[None, :], mask=(column < n)[:, None] & d_ok, other=0.0
        )
        scores = tl.dot(q.to(COMPUTE), tl.trans(k.to(COMPUTE)), input_precision="tf32x3")
        if beside_keys is not None:
            beside_q = tl.load(beside_queries + row, mask=row_ok, other=0.0)
            beside_k = tl.load(beside_keys + column, mask=column < n, other=0.0)
            scores += beside_q[:, None] * beside_k[None, :]
        scores = tl.where(column[None, :] < limit[:, None], scores, float("-inf"))
        best = tl.max(tl.reshape(scores, [BLOCK_M, BLOCK_N // CHUNK, CHUNK]), 2)
    run = tl.program_id(0) * (BLOCK_N // CHUNK) + tl.arange(0, BLOCK_N // CHUNK)
    tl.store(maxima + row[:, None].to(tl.int64) * stride_m + run[None, :], best, mask=row_ok[:, None])


@triton.jit(do_not_specialize=["n", "runs"])
def chunk_scores_kernel(  # type: ignore[no-untyped-def]
    queries, keys, beside_queries, beside_keys, visible, chunks, scores, n, dim, runs, stride_q, stride_k,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one query's scores [runs * CHUNK] of the keys of its runs, -inf for those that it does not see."""
    row = tl.program_id(0).to(tl.int64)
    limit = tl.load(visible + row)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(queries + row * stride_q + d, mask=d < dim, other=0.0).to(tl.float32)
    for first in range(0, runs * CHUNK, BLOCK_C):
        slot = first + tl.arange(0, BLOCK_C)
        run = tl.load(chunks + row * runs + slot // CHUNK, mask=slot < runs * CHUNK, other=0)
        column = run * CHUNK + slot % CHUNK
        seen = (column < limit) & (slot < runs * CHUNK)
        k = tl.load(
            keys + column[:, None].to(tl.int64) * stride_k + d[None, :],
            mask=seen[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        score = tl.sum(k.to(tl.float32) * q[None, :], 1)
        if beside_keys is not None:
            score += tl.load(beside_queries + row) * tl.load(beside_keys + column, mask=seen, other=0.0)
        tl.store(scores + row * runs * CHUNK + slot, tl.where(seen, score, float("-inf")), mask=slot < runs * CHUNK)


@triton.jit(do_not_specialize=["width", "stride"])
def largest_kernel(scores, out, width, k, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: one row. Finds the k-th largest value bit by bit, then lists what is above it and, in their order,
    as many of its equals as are missing."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < width
    bits = tl.load(scores + row * stride + column, mask=there, other=float("-inf")).to(tl.int32, bitcast=True)
    # Unsigned numbers in the order of the scores; no score has 0.
    ordinal = tl.where(bits >= 0, bits | -2147483648, ~bits).to(tl.uint32, bitcast=True)
    ordinal = tl.where(there, ordinal, 0)
    threshold = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum((ordinal >= (threshold | bit)).to(tl.int32), 0) >= k
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    above = (ordinal > threshold).to(tl.int32)
    equal = (ordinal == threshold).to(tl.int32)
    missing = k - tl.sum(above, 0)
    taken = (above > 0) | ((equal > 0) & (tl.cumsum(equal, 0) <= missing))
    slot = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(out + row * k + slot, column, mask=taken)
