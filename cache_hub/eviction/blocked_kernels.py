"""Triton kernels of the blocked chain: sums of causal rows, and the walks of all heads in one launch.

A block of columns belongs to one program, so that nothing is added by two. It takes what the rows behind it send, while
these are being solved by other programs, and solves its own with the inverse of its block on the diagonal, which an
earlier launch made for all blocks at once. Programs draw tickets, and blocks go by tickets from the last to the first:
a program waits for programs alone that began before it, however many of them run at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Rows and columns of attention that a program holds at a time, and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int = 3

    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "num_warps": self.warps, "num_stages": self.stages}


LOG_SUMS, SPREAD = Tile(128, 64, 8), Tile(64, 128, 4)
# Of rows too long for those, such as 128 numbers of float32.
LONG_LOG_SUMS, LONG_SPREAD = Tile(64, 32, 8), Tile(32, 64, 8)


def triton_log_sums(query: Tensor, key: Tensor, scale: float, first: int = 0) -> tuple[Tensor, Tensor]:
    """`torch_log_sums` by a kernel: log-sum-exp [B, H, n - first] float32 of the causal rows from `first` on, and that
    of the row without its own token, -inf for token 0. query [B, H, n, D], key [B, Hkv, n, D]."""
    batch, heads, n, _ = query.shape
    total, others = (torch.empty(batch, heads, n - first, device=query.device) for _ in range(2))
    tile = LOG_SUMS if _narrow(query) else LONG_LOG_SUMS
    query, key = _with_whole_rows(query), _with_whole_rows(key)
    with torch.cuda.device_of(query):
        log_sums_kernel[(triton.cdiv(n - first, tile.rows), batch * heads)](
            query, key, total, others, first, *_where(query, key, scale), **_sizes(query), **tile.options()
        )
    return total, others


def triton_solve(query: Tensor, key: Tensor, shift: Tensor, mass: Tensor, scale: float, sink_size: int) -> None:
    """`torch_solve` by kernels: mass [B, H, k, n] float32, contiguous, becomes y = mass + y M with
    M_ij = exp(scale <q_i, k_j> - shift_i) for j < i and i >= sink_size, shift [B, H, n] float32, infinite for sinks.

    Two masses share a pass. Beside them 4 * columns bytes a token and head are taken for the inverses: 512, or 256
    where rows of queries are longer than 256 bytes.
    """
    batch, heads, starts, n = mass.shape
    if starts > 2:
        for pair in mass.split(2, 2):
            solved = pair.contiguous()
            triton_solve(query, key, shift, solved, scale, sink_size)
            pair.copy_(solved)
        return
    query, key, tile = _with_whole_rows(query), _with_whole_rows(key), _spread_tile(query)
    units, blocks = batch * heads, triton.cdiv(n, tile.columns)
    inverse = torch.empty(units, blocks, tile.columns, tile.columns, device=query.device)
    shift = shift.contiguous()
    # How many blocks of each head are solved, and the tickets drawn.
    progress = torch.zeros(units + 1, dtype=torch.int32, device=query.device)
    where, sizes = _where(query, key, scale), _sizes(query)
    with torch.cuda.device_of(query):
        halves = {**sizes, "HALF": tile.columns // 2, "num_warps": 4 if _narrow(query) else 8}
        invert_kernel[(2 * blocks, units)](query, key, shift, inverse, sink_size, *where, **halves)
        join_kernel[(blocks, units)](query, key, shift, inverse, sink_size, *where, **halves)
        chain_kernel[(blocks * units,)](
            query, key, shift, inverse, mass, progress, sink_size, units, *where,
            **sizes, STARTS=starts, **tile.options(),
        )  # fmt: skip


def triton_received(
    query: Tensor, key: Tensor, total: Tensor, scale: float, given: Tensor | None = None, columns: int | None = None
) -> Tensor:
    """What tokens receive by causal attention from the last rows, [B, H, k, columns] float32, all columns by default.

    total [B, H, W] float32: log-sum-exp of the last W rows; given [B, H, k, W], k 1 or 2: what each row gives, 1 unless
    stated. query [B, H, n, D], key [B, Hkv, n, D].
    """
    batch, heads, n, _ = query.shape
    columns = n if columns is None else columns
    given = torch.ones_like(total).unsqueeze(2) if given is None else given.float().contiguous()
    starts = given.shape[2]
    received = torch.empty(batch, heads, starts, columns, device=query.device)
    query, key, tile = _with_whole_rows(query), _with_whole_rows(key), _spread_tile(query)
    with torch.cuda.device_of(query):
        received_kernel[(triton.cdiv(columns, tile.columns), batch * heads)](
            query, key, total.float().contiguous(), given, received, n - total.shape[2], columns,
            *_where(query, key, scale), **_sizes(query), STARTS=starts, **tile.options(),
        )  # fmt: skip
    return received


def _with_whole_rows(states: Tensor) -> Tensor:
    return states if states.stride(3) == 1 else states.contiguous()


def _where(query: Tensor, key: Tensor, scale: float) -> tuple[float, ...]:
    heads = query.shape[1]
    return *query.stride()[:3], *key.stride()[:3], scale * _LOG2_E, query.shape[2], heads, heads // key.shape[1]


def _narrow(query: Tensor) -> bool:
    """Whether rows are so short that large tiles of them fit."""
    return query.shape[3] * query.element_size() <= 256


def _spread_tile(query: Tensor) -> Tile:
    return SPREAD if _narrow(query) else LONG_SPREAD


def _sizes(query: Tensor) -> dict[str, Any]:
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    dim = query.shape[3]
    # The interpreter multiplies in float32 alone.
    compute = types.get(query.dtype, tl.float32) if query.is_cuda else tl.float32
    return {"DIM": dim, "BLOCK_D": max(triton.next_power_of_2(dim), 16), "COMPUTE": compute}


_COUNTS = ["n", "heads", "group", "first", "columns", "sinks", "units"]


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    base, stride, first, limit, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
    WHOLE: tl.constexpr = False,
):  # fmt: skip
    """[ROWS, BLOCK_D] of rows first to first + ROWS behind `base`; zeros from row `limit` and column DIM on. WHOLE: all
    rows lie before the limit."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    if WHOLE and DIM == BLOCK_D:
        return tl.load(pointers).to(COMPUTE)
    if DIM == BLOCK_D:
        return tl.load(pointers, mask=(first + row < limit)[:, None], other=0.0).to(COMPUTE)
    return tl.load(pointers, mask=(first + row < limit)[:, None] & (column < DIM)[None, :], other=0.0).to(COMPUTE)


@triton.jit(do_not_specialize=_COUNTS)
def log_sums_kernel(  # type: ignore[no-untyped-def]
    query, key, total, others, first,
    query_batch, query_head, query_row, key_batch, key_head, key_row, scale, n, heads, group,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head, against all keys before them. The last rows come first, being longest."""
    begin = first + (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    unit = tl.program_id(1).to(tl.int64)
    queries = query + unit // heads * query_batch + unit % heads * query_head
    keys = key + unit // heads * key_batch + unit % heads // group * key_head
    rows = begin + tl.arange(0, BLOCK_M)
    asked = _rows(queries, query_row, begin, n, DIM, BLOCK_M, BLOCK_D, COMPUTE)
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    summed = tl.zeros([BLOCK_M], tl.float32)
    # Tiles that lie before all of the rows, then those that do not.
    whole = begin // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        seen = _rows(keys, key_row, start, n, DIM, BLOCK_N, BLOCK_D, COMPUTE, True)
        logits = tl.dot(asked, tl.trans(seen), input_precision="ieee") * scale
        higher = tl.maximum(highest, tl.max(logits, 1))
        summed = summed * tl.exp2(highest - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        highest = higher
    own = tl.zeros([BLOCK_M], tl.float32)
    for start in range(whole, tl.minimum(begin + BLOCK_M, n), BLOCK_N):
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
    place = unit * (n - first) + rows - first
    tl.store(others + place, without * 0.6931471805599453, mask=rows < n)
    tl.store(total + place, both * 0.6931471805599453, mask=rows < n)


@triton.jit
def _transitions(  # type: ignore[no-untyped-def]
    queries, query_row, keys, key_row, shifts, row, column, n, sinks, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """M [SIZE, SIZE] of rows row to row + SIZE and columns column to column + SIZE, 0 where it is not below the
    diagonal, in rows of sinks and behind the last row."""
    rows = row + tl.arange(0, SIZE)
    columns = column + tl.arange(0, SIZE)
    asked = _rows(queries, query_row, row, n, DIM, SIZE, BLOCK_D, COMPUTE)
    seen = _rows(keys, key_row, column, n, DIM, SIZE, BLOCK_D, COMPUTE)
    shift = tl.load(shifts + rows, mask=rows < n, other=0.0) * 1.4426950408889634
    logits = tl.dot(asked, tl.trans(seen), input_precision="ieee") * scale
    sends = (rows >= sinks) & (rows < n)
    return tl.where((rows[:, None] > columns[None, :]) & sends[:, None], tl.exp2(logits - shift[:, None]), 0.0)


@triton.jit(do_not_specialize=_COUNTS)
def invert_kernel(  # type: ignore[no-untyped-def]
    query, key, shift, inverse, sinks,
    query_batch, query_head, query_row, key_batch, key_head, key_row, scale, n, heads, group,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program: (I - M)^-1 of the upper left or the lower right half of one block on the diagonal of one head.

    M is strictly lower triangular: the inverse is the product of I + M^(2^p) for 2^p below HALF, sums of positive
    numbers only.
    """
    first = tl.program_id(0) * HALF
    unit = tl.program_id(1).to(tl.int64)
    queries = query + unit // heads * query_batch + unit % heads * query_head
    keys = key + unit // heads * key_batch + unit % heads // group * key_head
    power = _transitions(
        queries, query_row, keys, key_row, shift + unit * n, first, first, n, sinks, scale, DIM, BLOCK_D, COMPUTE, HALF
    )
    at = tl.arange(0, HALF)
    found = power + tl.where(at[:, None] == at[None, :], 1.0, 0.0)
    width = 2
    while width < HALF:
        power = tl.dot(power, power, input_precision="tf32x3")
        found += tl.dot(found, power, input_precision="tf32x3")
        width *= 2
    block = unit * (tl.num_programs(0) // 2) + tl.program_id(0) // 2
    place = inverse + block * 4 * HALF * HALF + at[:, None] * 2 * HALF + at[None, :]
    tl.store(place + tl.program_id(0) % 2 * (2 * HALF * HALF + HALF), found)


@triton.jit(do_not_specialize=_COUNTS)
def join_kernel(  # type: ignore[no-untyped-def]
    query, key, shift, inverse, sinks,
    query_batch, query_head, query_row, key_batch, key_head, key_row, scale, n, heads, group,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program: the rest of the inverse of one block, from those of its halves: zeros, and the lower left, which is
    the lower half's times M times the upper half's."""
    first = tl.program_id(0) * 2 * HALF
    unit = tl.program_id(1).to(tl.int64)
    queries = query + unit // heads * query_batch + unit % heads * query_head
    keys = key + unit // heads * key_batch + unit % heads // group * key_head
    across = _transitions(
        queries, query_row, keys, key_row, shift + unit * n, first + HALF, first, n, sinks, scale,
        DIM, BLOCK_D, COMPUTE, HALF,
    )  # fmt: skip
    at = tl.arange(0, HALF)
    place = inverse + (unit * tl.num_programs(0) + tl.program_id(0)) * 4 * HALF * HALF
    place += at[:, None] * 2 * HALF + at[None, :]
    across = tl.dot(across, tl.load(place), input_precision="tf32x3")
    across = tl.dot(tl.load(place + 2 * HALF * HALF + HALF), across, input_precision="tf32x3")
    tl.store(place + 2 * HALF * HALF, across)
    tl.store(place + HALF, tl.zeros([HALF, HALF], tl.float32))


@triton.jit
def _taken(  # type: ignore[no-untyped-def]
    one, two, seen, columns, queries, query_row, shifts, given, length, begin, end, sinks, scale, n,
    CAUSAL: tl.constexpr, STARTS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """one and two [columns] with what rows begin to end give the columns: given and given + length times their
    attention. The last rows come first, so that the order of a sum does not depend on how its rows come in parts. What
    a tile of rows gives is loaded while the one before it is multiplied, and from the cache that all programs share,
    since others may have written it. Rows of the first tile that are not asked for weigh exp(-inf)."""
    tiles = tl.cdiv(end - begin, BLOCK_M)
    rows = begin + (tiles - 1) * BLOCK_M + tl.arange(0, BLOCK_M)
    sends = (rows >= sinks) & (rows >= begin) & (rows < end)
    next_shift = tl.load(shifts + rows, mask=sends, other=float("inf"))
    next_one = tl.load(given + rows, mask=sends, other=0.0, cache_modifier=".cg")
    next_two = next_one
    if STARTS == 2:
        next_two = tl.load(given + length + rows, mask=sends, other=0.0, cache_modifier=".cg")
    for tile in range(tiles):
        shift = next_shift * 1.4426950408889634
        gives_one = next_one
        gives_two = next_two
        here = rows
        asked = _rows(queries, query_row, begin + (tiles - 1 - tile) * BLOCK_M, n, DIM, BLOCK_M, BLOCK_D, COMPUTE)
        rows -= BLOCK_M
        sends = (rows >= sinks) & (rows >= begin)
        next_shift = tl.load(shifts + rows, mask=sends, other=float("inf"))
        next_one = tl.load(given + rows, mask=sends, other=0.0, cache_modifier=".cg")
        if STARTS == 2:
            next_two = tl.load(given + length + rows, mask=sends, other=0.0, cache_modifier=".cg")
        weights = tl.exp2(tl.dot(seen, tl.trans(asked), input_precision="ieee") * scale - shift[None, :])
        if CAUSAL:
            weights = tl.where(columns[:, None] <= here[None, :], weights, 0.0)
        one += tl.sum(weights * gives_one[None, :], 1)
        if STARTS == 2:
            two += tl.sum(weights * gives_two[None, :], 1)
    return one, two


@triton.jit(do_not_specialize=_COUNTS)
def chain_kernel(  # type: ignore[no-untyped-def]
    query, key, shift, inverse, mass, progress, sinks, units,
    query_batch, query_head, query_row, key_batch, key_head, key_row, scale, n, heads, group,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, STARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of one head, in place in mass, from all rows behind them."""
    tl.static_assert(BLOCK_N % BLOCK_M == 0)
    ticket = tl.atomic_add(progress + units, 1)
    blocks = tl.cdiv(n, BLOCK_N)
    block = blocks - 1 - ticket // units
    head = ticket % units
    unit = head.to(tl.int64)
    queries = query + unit // heads * query_batch + unit % heads * query_head
    keys = key + unit // heads * key_batch + unit % heads // group * key_head
    shifts = shift + unit * n
    line = mass + unit * STARTS * n
    first = block * BLOCK_N
    at = tl.arange(0, BLOCK_N)
    columns = first + at
    seen = _rows(keys, key_row, first, n, DIM, BLOCK_N, BLOCK_D, COMPUTE)
    one = tl.zeros([BLOCK_N], tl.float32)
    two = one
    # Rows from here on are taken.
    end = blocks * BLOCK_N
    while end > first + BLOCK_N:
        solved = tl.atomic_add(progress + head, 0)
        begin = (blocks - solved) * BLOCK_N
        one, two = _taken(
            one, two, seen, columns, queries, query_row, shifts, line, n, begin, tl.minimum(end, n), sinks, scale, n,
            False, STARTS, DIM, BLOCK_D, COMPUTE, BLOCK_M,
        )  # fmt: skip
        end = begin
    here = columns < n
    inverted = tl.load(inverse + (unit * blocks + block) * BLOCK_N * BLOCK_N + at[:, None] * BLOCK_N + at[None, :])
    entering = tl.load(line + columns, mask=here, other=0.0) + one
    # A thread writes what others have read.
    tl.debug_barrier()
    tl.store(line + columns, tl.sum(entering[:, None] * inverted, 0), mask=here)
    if STARTS == 2:
        entering = tl.load(line + n + columns, mask=here, other=0.0) + two
        tl.debug_barrier()
        tl.store(line + n + columns, tl.sum(entering[:, None] * inverted, 0), mask=here)
    # All threads have written before one says so.
    tl.debug_barrier()
    tl.atomic_add(progress + head, 1)


@triton.jit(do_not_specialize=_COUNTS)
def received_kernel(  # type: ignore[no-untyped-def]
    query, key, total, given, received, first, columns,
    query_batch, query_head, query_row, key_batch, key_head, key_row, scale, n, heads, group,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr, STARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: what the rows from `first` on give to BLOCK_N of the columns of one head."""
    unit = tl.program_id(1).to(tl.int64)
    queries = query + unit // heads * query_batch + unit % heads * query_head
    keys = key + unit // heads * key_batch + unit % heads // group * key_head
    column = tl.program_id(0) * BLOCK_N
    at = column + tl.arange(0, BLOCK_N)
    length = n - first
    totals = total + unit * length - first
    line = given + unit * STARTS * length - first
    seen = _rows(keys, key_row, column, n, DIM, BLOCK_N, BLOCK_D, COMPUTE)
    one = tl.zeros([BLOCK_N], tl.float32)
    two = one
    # Rows among the columns, then those behind them.
    begin = tl.maximum(first, column)
    behind = tl.minimum(tl.maximum(first, column + BLOCK_N), n)
    one, two = _taken(
        one, two, seen, at, queries, query_row, totals, line, length, begin, behind, 0, scale, n,
        True, STARTS, DIM, BLOCK_D, COMPUTE, BLOCK_M,
    )  # fmt: skip
    one, two = _taken(
        one, two, seen, at, queries, query_row, totals, line, length, behind, n, 0, scale, n,
        False, STARTS, DIM, BLOCK_D, COMPUTE, BLOCK_M,
    )  # fmt: skip
    there = received + unit * STARTS * columns + at
    tl.store(there, one, mask=at < columns)
    if STARTS == 2:
        tl.store(there + columns, two, mask=at < columns)
