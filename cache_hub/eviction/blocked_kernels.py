"""Triton kernels of the blocked chain: sums of causal rows, and the walks of all heads from the last rows to the first.

A column of attention belongs to one program, so that nothing is added by two. Rows are taken in strips, the last one
first: one launch solves a strip for every head (a program each, with inverses of its blocks that an earlier launch made
for all of them at once), the next spreads what was solved over all columns before it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows that one launch solves and the next spreads; rows and columns of the blocks that are inverted.
STRIP, BLOCK = 512, 64
_LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Rows and columns of a program, and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int = 3

    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "num_warps": self.warps, "num_stages": self.stages}


LOG_SUMS, SPREAD, SPREAD_TWO = Tile(128, 128, 8), Tile(64, 128, 8), Tile(64, 64, 4)
# Of rows too long for those, such as all of float32.
LONG_LOG_SUMS, LONG_SPREAD = Tile(64, 32, 8), Tile(32, 32, 4)


def triton_log_sums(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`torch_log_sums` by a kernel: log-sum-exp [B, H, n] float32 of every causal row, and that of the row without its
    own token, -inf for token 0. query [B, H, n, D], key [B, Hkv, n, D], rows of D contiguous."""
    batch, heads, n, _ = query.shape
    total, others = (torch.empty(batch, heads, n, device=query.device) for _ in range(2))
    tile = LOG_SUMS if _narrow(query) else LONG_LOG_SUMS
    with torch.cuda.device_of(query):
        log_sums_kernel[(triton.cdiv(n, tile.rows), batch * heads)](
            query, key, total, others, *query.stride()[:3], *key.stride()[:3],
            scale * _LOG2_E, n, heads, heads // key.shape[1],
            **_sizes(query), **tile.options(),
        )  # fmt: skip
    return total, others


def triton_solve(query: Tensor, key: Tensor, shift: Tensor, mass: Tensor, scale: float, sink_size: int) -> None:
    """`torch_solve` by kernels: mass [B, H, k, n] float32, contiguous, becomes y = mass + y M with
    M_ij = exp(scale <q_i, k_j> - shift_i) for j < i and i >= sink_size, shift [B, H, n] float32, infinite for sinks.

    Two masses share a pass. Beside them 4 * BLOCK bytes a token and head are taken, for the inverses.
    """
    batch, heads, starts, n = mass.shape
    if starts > 2:
        for pair in mass.split(2, 2):
            solved = pair.contiguous()
            triton_solve(query, key, shift, solved, scale, sink_size)
            pair.copy_(solved)
        return
    blocks = triton.cdiv(n, BLOCK)
    inverse = torch.empty(batch, heads, blocks, BLOCK, BLOCK, device=query.device)
    shift = shift.contiguous()
    where = (*query.stride()[:3], *key.stride()[:3], scale * _LOG2_E, sink_size, n, heads, heads // key.shape[1])
    sizes, warps = _sizes(query) | {"BLOCK": BLOCK}, 4 if _narrow(query) else 8
    with torch.cuda.device_of(query):
        invert_kernel[(blocks, batch * heads)](query, key, shift, inverse, *where, **sizes, num_warps=warps)
        for low in range((n - 1) // STRIP * STRIP, -1, -STRIP):
            high = min(low + STRIP, n)
            if high <= sink_size:
                break
            solve_kernel[(batch * heads,)](
                query,
                key,
                shift,
                inverse,
                mass,
                low,
                high,
                *where,
                STARTS=starts,
                **sizes,
                num_warps=warps,
                num_stages=3,
            )
            if low:
                _spread(query, key, shift, mass, mass, low, high, low, where, starts)


def triton_received(query: Tensor, key: Tensor, total: Tensor, scale: float) -> Tensor:
    """Sums [B, H, n] float32 over all rows of the causal attention whose log-sum-exp is total [B, H, n] float32."""
    batch, heads, n, _ = query.shape
    given = torch.ones(batch, heads, 1, n, device=query.device)
    received = torch.zeros_like(given)
    where = (*query.stride()[:3], *key.stride()[:3], scale * _LOG2_E, 0, n, heads, heads // key.shape[1])
    with torch.cuda.device_of(query):
        _spread(query, key, total.contiguous(), given, received, 0, n, n, where, 1)
    return received.squeeze(2)


def _spread(
    query: Tensor, key: Tensor, shift: Tensor, given: Tensor, taken: Tensor,
    low: int, high: int, columns: int, where: tuple[float, ...], starts: int,
) -> None:  # fmt: skip
    """Adds to columns 0 to `columns` of taken what rows low to high of given [B, H, k, n] send there."""
    tile = LONG_SPREAD if not _narrow(query) else SPREAD if starts == 1 else SPREAD_TWO
    spread_kernel[(triton.cdiv(columns, tile.columns), query.shape[0] * query.shape[1])](
        query, key, shift, given, taken, low, high, columns, *where,
        STARTS=starts, CAUSAL=columns > low, **_sizes(query), **tile.options(),
    )  # fmt: skip


def _narrow(query: Tensor) -> bool:
    """Whether rows are so short that large tiles of them fit."""
    return query.shape[3] * query.element_size() <= 256


def _sizes(query: Tensor) -> dict[str, Any]:
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    dim = query.shape[3]
    # The interpreter multiplies in float32 alone.
    compute = types.get(query.dtype, tl.float32) if query.is_cuda else tl.float32
    return {"DIM": dim, "BLOCK_D": max(triton.next_power_of_2(dim), 16), "COMPUTE": compute}


_COUNTS = ["n", "heads", "group", "low", "high", "columns", "sinks"]


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    base, stride, first, limit, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """[ROWS, BLOCK_D] of rows first to first + ROWS behind `base`; zeros from row `limit` and column DIM on."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=(first + row < limit)[:, None] & (column < DIM)[None, :], other=0.0).to(COMPUTE)


@triton.jit(do_not_specialize=_COUNTS)
def log_sums_kernel(  # type: ignore[no-untyped-def]
    query, key, total, others,
    query_batch, query_head, query_row, key_batch, key_head, key_row, scale, n, heads, group,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head, against all keys before them. The last rows come first, being longest."""
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    unit = tl.program_id(1).to(tl.int64)
    queries = query + unit // heads * query_batch + unit % heads * query_head
    keys = key + unit // heads * key_batch + unit % heads // group * key_head
    rows = first + tl.arange(0, BLOCK_M)
    asked = _rows(queries, query_row, first, n, DIM, BLOCK_M, BLOCK_D, COMPUTE)
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    summed = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, first, BLOCK_N):
        seen = _rows(keys, key_row, start, first, DIM, BLOCK_N, BLOCK_D, COMPUTE)
        logits = tl.dot(asked, tl.trans(seen), input_precision="ieee") * scale
        higher = tl.maximum(highest, tl.max(logits, 1))
        summed = summed * tl.exp2(highest - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        highest = higher
    own = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, tl.minimum(first + BLOCK_M, n), BLOCK_N):
        seen = _rows(keys, key_row, start, n, DIM, BLOCK_N, BLOCK_D, COMPUTE)
        logits = tl.dot(asked, tl.trans(seen), input_precision="ieee") * scale
        apart = rows[:, None] - start - tl.arange(0, BLOCK_N)[None, :]
        own += tl.sum(tl.where(apart == 0, logits, 0.0), 1)
        logits = tl.where(apart > 0, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        summed = summed * tl.exp2(highest - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        highest = higher
    without = highest + tl.log2(summed)
    top = tl.maximum(without, own)
    both = top + tl.log2(tl.exp2(without - top) + tl.exp2(own - top))
    place = unit * n + rows
    tl.store(others + place, without * 0.6931471805599453, mask=rows < n)
    tl.store(total + place, both * 0.6931471805599453, mask=rows < n)


@triton.jit(do_not_specialize=_COUNTS)
def invert_kernel(  # type: ignore[no-untyped-def]
    query, key, shift, inverse,
    query_batch, query_head, query_row, key_batch, key_head, key_row, scale, sinks, n, heads, group,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: (I - M)^-1 of one block on the diagonal of one head.

    M is strictly lower triangular, so that the inverse is the product of I + M^(2^p) for 2^p below BLOCK, sums of
    positive numbers only.
    """
    first = tl.program_id(0) * BLOCK
    unit = tl.program_id(1).to(tl.int64)
    queries = query + unit // heads * query_batch + unit % heads * query_head
    keys = key + unit // heads * key_batch + unit % heads // group * key_head
    at = tl.arange(0, BLOCK)
    rows = first + at
    asked = _rows(queries, query_row, first, n, DIM, BLOCK, BLOCK_D, COMPUTE)
    seen = _rows(keys, key_row, first, n, DIM, BLOCK, BLOCK_D, COMPUTE)
    shifts = tl.load(shift + unit * n + rows, mask=rows < n, other=0.0) * 1.4426950408889634
    logits = tl.dot(asked, tl.trans(seen), input_precision="ieee") * scale
    sends = (rows >= sinks) & (rows < n)
    power = tl.where((at[:, None] > at[None, :]) & sends[:, None], tl.exp2(logits - shifts[:, None]), 0.0)
    found = power + tl.where(at[:, None] == at[None, :], 1.0, 0.0)
    width = 2
    while width < BLOCK:
        power = tl.dot(power, power, input_precision="tf32x3")
        found += tl.dot(found, power, input_precision="tf32x3")
        width *= 2
    place = (unit * tl.num_programs(0) + tl.program_id(0)) * BLOCK * BLOCK
    tl.store(inverse + place + at[:, None] * BLOCK + at[None, :], found)


@triton.jit(do_not_specialize=_COUNTS)
def solve_kernel(  # type: ignore[no-untyped-def]
    query, key, shift, inverse, mass, low, high,
    query_batch, query_head, query_row, key_batch, key_head, key_row, scale, sinks, n, heads, group,
    STARTS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: the rows low to high of one head, block by block from the last; in place in mass."""
    unit = tl.program_id(0).to(tl.int64)
    queries = query + unit // heads * query_batch + unit % heads * query_head
    keys = key + unit // heads * key_batch + unit % heads // group * key_head
    at = tl.arange(0, BLOCK)
    line = mass + unit * STARTS * n
    inverses = inverse + unit * tl.cdiv(n, BLOCK) * BLOCK * BLOCK
    for back in range(0, tl.cdiv(high - low, BLOCK)):
        first = low + (tl.cdiv(high - low, BLOCK) - 1 - back) * BLOCK
        columns = first + at
        seen = _rows(keys, key_row, first, n, DIM, BLOCK, BLOCK_D, COMPUTE)
        one = tl.load(line + columns, mask=columns < n, other=0.0)
        two = one
        if STARTS == 2:
            two = tl.load(line + n + columns, mask=columns < n, other=0.0)
        for start in range(first + BLOCK, high, BLOCK):
            rows = start + at
            sends = (rows >= sinks) & (rows < n)
            asked = _rows(queries, query_row, start, n, DIM, BLOCK, BLOCK_D, COMPUTE)
            shifts = tl.load(shift + unit * n + rows, mask=rows < n, other=0.0) * 1.4426950408889634
            weights = tl.exp2(tl.dot(asked, tl.trans(seen), input_precision="ieee") * scale - shifts[:, None])
            sent = tl.load(line + rows, mask=sends, other=0.0)
            one += tl.sum(sent[:, None] * weights, 0)
            if STARTS == 2:
                sent = tl.load(line + n + rows, mask=sends, other=0.0)
                two += tl.sum(sent[:, None] * weights, 0)
        solved = tl.load(inverses + first * BLOCK + at[:, None] * BLOCK + at[None, :])
        tl.store(line + columns, tl.sum(one[:, None] * solved, 0), mask=columns < n)
        if STARTS == 2:
            tl.store(line + n + columns, tl.sum(two[:, None] * solved, 0), mask=columns < n)
        # The next block reads what this one's threads wrote.
        tl.debug_barrier()


@triton.jit(do_not_specialize=_COUNTS)
def spread_kernel(  # type: ignore[no-untyped-def]
    query, key, shift, given, taken, low, high, columns,
    query_batch, query_head, query_row, key_batch, key_head, key_row, scale, sinks, n, heads, group,
    STARTS: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: what rows low to high of one head send to BLOCK_N of the columns before `columns`. CAUSAL: some of
    these columns lie behind some of the rows."""
    unit = tl.program_id(1).to(tl.int64)
    queries = query + unit // heads * query_batch + unit % heads * query_head
    keys = key + unit // heads * key_batch + unit % heads // group * key_head
    column = tl.program_id(0) * BLOCK_N
    at = column + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_M)
    seen = _rows(keys, key_row, column, n, DIM, BLOCK_N, BLOCK_D, COMPUTE)
    one = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    two = one
    line = given + unit * STARTS * n
    begin = low
    if CAUSAL:
        begin = tl.maximum(low, column)
    for start in range(begin, high, BLOCK_M):
        rows = start + lane
        sends = (rows >= sinks) & (rows < high)
        asked = _rows(queries, query_row, start, high, DIM, BLOCK_M, BLOCK_D, COMPUTE)
        shifts = tl.load(shift + unit * n + rows, mask=rows < high, other=0.0) * 1.4426950408889634
        weights = tl.exp2(tl.dot(seen, tl.trans(asked), input_precision="ieee") * scale - shifts[None, :])
        if CAUSAL:
            weights = tl.where(at[:, None] <= rows[None, :], weights, 0.0)
        one += weights * tl.load(line + rows, mask=sends, other=0.0)[None, :]
        if STARTS == 2:
            two += weights * tl.load(line + n + rows, mask=sends, other=0.0)[None, :]
    there = taken + unit * STARTS * n + at
    tl.store(there, tl.load(there, mask=at < columns, other=0.0) + tl.sum(one, 1), mask=at < columns)
    if STARTS == 2:
        there += n
        tl.store(there, tl.load(there, mask=at < columns, other=0.0) + tl.sum(two, 1), mask=at < columns)
