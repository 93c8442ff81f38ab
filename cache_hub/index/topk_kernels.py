"""The Triton kernels of streaming_topk, in the order in which they run."""

from __future__ import annotations

import triton
import triton.language as tl

# Lists of a query's hits. Of a tile of products a thread of sm_90 holds columns 2 w, 2 w + 1 of every eight, for one w
# of four: it alone writes to list w.
LISTS = 4
_LISTS = tl.constexpr(LISTS)
_LAST = tl.constexpr(2**31 - 1)
_NOTHING = tl.constexpr(-(2**63))


@triton.jit(do_not_specialize=["m", "samples", "every", "rank"])
def threshold_kernel(  # type: ignore[no-untyped-def]
    queries, sampled, beside_queries, beside_sampled, sample_ids, visible, order, thresholds, m, samples, every, rank,
    stride_q, stride_k,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
    COMPUTE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: for BLOCK_M queries the rank-th largest of the best scores of SLOTS groups of the sampled keys that
    they see, -inf where so many are not seen. sample_ids ascend; number t is t * every to t * every + every - 1."""
    row = tl.load(order + tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < m
    limit = tl.load(visible + row, mask=row_ok, other=0)
    q = _states(queries, row, stride_q, row_ok[:, None], DIM, BLOCK_D).to(COMPUTE)
    beside_q = 0.0
    if beside_queries is not None:
        beside_q = tl.load(beside_queries + row, mask=row_ok, other=0.0)[:, None]
    best = tl.full([BLOCK_M, SLOTS], float("-inf"), tl.float32)
    seen = tl.minimum(tl.min(tl.where(row_ok, limit, _LAST), 0) // every, samples)
    end = tl.minimum(tl.cdiv(tl.max(limit, 0), every), samples)
    for tile in tl.range(0, seen // BLOCK_N, num_stages=STAGES):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        scores = _products(q, beside_q, sampled, beside_sampled, column, None, stride_k, DIM, BLOCK_D, COMPUTE)
        best = tl.maximum(best, tl.max(tl.reshape(scores, [BLOCK_M, SLOTS, BLOCK_N // SLOTS]), 2))
    for tile in tl.range(seen // BLOCK_N, tl.cdiv(end, BLOCK_N), num_stages=1):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        ok = column < samples
        scores = _products(q, beside_q, sampled, beside_sampled, column, ok, stride_k, DIM, BLOCK_D, COMPUTE)
        place = tl.load(sample_ids + column, mask=ok, other=_LAST)
        scores = tl.where(place[None, :] < limit[:, None], scores, float("-inf"))
        best = tl.maximum(best, tl.max(tl.reshape(scores, [BLOCK_M, SLOTS, BLOCK_N // SLOTS]), 2))
    for _ in range(1, rank):
        best = tl.where(best == tl.max(best, 1)[:, None], float("-inf"), best)
    tl.store(thresholds + row, tl.max(best, 1), mask=row_ok)


@triton.jit(do_not_specialize=["m", "n"])
def hits_kernel(  # type: ignore[no-untyped-def]
    queries, keys, beside_queries, beside_keys, visible, order, thresholds, hits, counts, m, n, stride_q, stride_k,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAPACITY: tl.constexpr,
    COMPUTE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: the keys that score at least the threshold, of all that BLOCK_M queries see.

    hits [m, LISTS, CAPACITY] int64: a tile's number, and below it the bits of a list's columns, see _bits; counts
    [m, LISTS]: entries, CAPACITY + 1 for a list that had no room.
    """
    row = tl.load(order + tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < m
    limit = tl.load(visible + row, mask=row_ok, other=0)
    threshold = tl.load(thresholds + row, mask=row_ok, other=float("inf"))
    q = _states(queries, row, stride_q, row_ok[:, None], DIM, BLOCK_D).to(COMPUTE)
    beside_q = 0.0
    if beside_queries is not None:
        beside_q = tl.load(beside_queries + row, mask=row_ok, other=0.0)[:, None]
    lists = _by_thread(row[:, None] * _LISTS + tl.arange(0, _LISTS)[None, :], BLOCK_M).to(tl.int64)
    lists_ok = lists < m * _LISTS
    count = tl.zeros([BLOCK_M, _LISTS], tl.int32)
    whole = tl.min(tl.where(row_ok, limit, _LAST), 0) // BLOCK_N
    for tile in tl.range(0, whole, num_stages=STAGES):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        scores = _products(q, beside_q, keys, beside_keys, column, None, stride_k, DIM, BLOCK_D, COMPUTE)
        word = _bits(scores >= threshold[:, None], BLOCK_M, BLOCK_N)
        count = _append(hits, lists, count, tile, word, CAPACITY)
    for tile in tl.range(whole, tl.cdiv(tl.max(limit, 0), BLOCK_N), num_stages=1):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        ok = column < n
        scores = _products(q, beside_q, keys, beside_keys, column, ok, stride_k, DIM, BLOCK_D, COMPUTE)
        hit = (scores >= threshold[:, None]) & (column[None, :] < limit[:, None])
        count = _append(hits, lists, count, tile, _bits(hit, BLOCK_M, BLOCK_N), CAPACITY)
    tl.store(counts + lists, count, mask=lists_ok)


@triton.jit
def expand_kernel(  # type: ignore[no-untyped-def]
    hits, counts, ids, totals, BLOCK_N: tl.constexpr, CAPACITY: tl.constexpr, ROOM: tl.constexpr
):
    """One program: one query's hits as ids, [m, ROOM] of all, and their number, ROOM + 1 where some are missing."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, _LISTS * CAPACITY)
    number = slot // CAPACITY
    count = tl.load(counts + row * _LISTS + number)
    entry = tl.load(hits + row * _LISTS * CAPACITY + slot, mask=slot % CAPACITY < count, other=0)
    first = (entry >> 32).to(tl.int32) * BLOCK_N + 2 * number
    word = entry.to(tl.int32)
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    bits = (((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
    place = tl.cumsum(bits, 0) - bits
    for _ in range(0, tl.max(bits, 0)):
        # The number of the lowest bit: the exponent of its value.
        lowest = (word & -word).to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
        bit = (lowest >> 23) - 127
        tl.store(ids + row * ROOM + place, first + 8 * (bit >> 1) + (bit & 1), mask=(word != 0) & (place < ROOM))
        place += (word != 0).to(tl.int32)
        word = word & (word - 1)
    total = tl.where(tl.max(count, 0) > CAPACITY, ROOM + 1, tl.minimum(tl.sum(bits, 0), ROOM + 1))
    tl.store(totals + row, total)


@triton.jit
def score_kernel(  # type: ignore[no-untyped-def]
    queries, keys, beside_queries, beside_keys, ids, totals, ranked, stride_q, stride_k,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """One program: one query's candidates as whole numbers, ranked [m, ROOM] int64, in the order of their scores and,
    where those are equal, against that of their ids. The score in float32 is a number's upper half, see _float."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(totals + row)
    count = tl.where(count > ROOM, 0, count)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(queries + row * stride_q + d, mask=d < DIM, other=0.0).to(tl.float32)
    for first in range(0, count, BLOCK_C):
        place = first + tl.arange(0, BLOCK_C)
        ok = place < count
        column = tl.load(ids + row * ROOM + place, mask=ok, other=0)
        states = _states(keys, column, stride_k, ok[:, None], DIM, BLOCK_D)
        score = tl.sum(states.to(tl.float32) * q[None, :], 1)
        if beside_keys is not None:
            score += tl.load(beside_queries + row) * tl.load(beside_keys + column, mask=ok, other=0.0)
        bits = (score + 0.0).to(tl.int32, bitcast=True)
        ordinal = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)
        tl.store(ranked + row * ROOM + place, (ordinal << 32) | (column ^ _LAST).to(tl.int64), mask=ok)


@triton.jit(do_not_specialize=["m", "k"])
def rank_kernel(  # type: ignore[no-untyped-def]
    ranked, totals, floors, out, failed, m, k,
    LOG_Q: tl.constexpr, LOG_C: tl.constexpr, LOG_K: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """One program: the k <= WIDTH best of the candidates of BLOCK_Q queries, and whether that says nothing about all
    keys: there were too many candidates, or the k-th scores below the floor, to which keys that are none may reach."""
    BLOCK_Q: tl.constexpr = 1 << LOG_Q
    BLOCK_C: tl.constexpr = 1 << LOG_C
    WIDTH: tl.constexpr = 1 << LOG_K
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_ok = row < m
    total = tl.load(totals + row, mask=row_ok, other=0)
    count = tl.where(total > ROOM, 0, total)
    mine = ranked + row[:, None].to(tl.int64) * ROOM + tl.arange(0, BLOCK_C)[None, :]
    place = tl.arange(0, BLOCK_C)[None, :]
    best = _largest(tl.load(mine, mask=place < count[:, None], other=_NOTHING), LOG_Q, LOG_C, LOG_K)
    for first in range(BLOCK_C, tl.max(count, 0), BLOCK_C):
        more = tl.load(mine + first, mask=first + place < count[:, None], other=_NOTHING)
        both = tl.join(best, _largest(more, LOG_Q, LOG_C, LOG_K))
        best = _largest(tl.reshape(both, [BLOCK_Q, 2 * WIDTH]), LOG_Q, LOG_K + 1, LOG_K)
    at = tl.arange(0, WIDTH)[None, :]
    there = best > _NOTHING
    lists = out + row[:, None].to(tl.int64) * k + at
    tl.store(lists, tl.where(there, best.to(tl.int32) ^ _LAST, -1), mask=row_ok[:, None] & (at < k))
    last = tl.sum(tl.where(at == k - 1, best >> 32, 0), 1).to(tl.int32)
    score = tl.where(last >= 0, last, last ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)
    score = tl.where(tl.sum(there.to(tl.int32), 1) < k, float("-inf"), score)
    low = score < tl.load(floors + row, mask=row_ok, other=0.0)
    tl.store(failed + row, low | (total > ROOM), mask=row_ok)


@triton.jit
def _largest(table, LOG_ROWS: tl.constexpr, LOG_SIZE: tl.constexpr, LOG_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest, in falling order, of each row of table [2 ** LOG_ROWS, 2 ** LOG_SIZE] int64: a bitonic network, as
    tl.topk, whose exchanges Triton's interpreter makes one element at a time."""
    DIMS: tl.constexpr = LOG_ROWS + LOG_SIZE
    x = tl.reshape(table, [2] * DIMS)
    for stage in tl.static_range(1, LOG_K + 1):
        x = _merge(x, stage, DIMS, stage == LOG_SIZE)
    for stage in tl.static_range(LOG_K + 1, LOG_SIZE + 1):
        x = _merge(tl.max(x, DIMS - stage), LOG_K, DIMS + LOG_K - stage, stage == LOG_SIZE)
    return tl.reshape(x, [1 << LOG_ROWS, 1 << LOG_K])


@triton.jit
def _merge(x, BITS: tl.constexpr, DIMS: tl.constexpr, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sorts runs of 2 ** BITS bitonic elements of x [2, 2, ..]: in turns rising and falling, where LAST falling."""
    for step in tl.static_range(BITS):
        other = tl.sum(x, DIMS - BITS + step, keep_dims=True) - x
        right = _side(BITS - 1 - step, DIMS)
        x = tl.where((x < other) == (right == (1 if LAST else _side(BITS, DIMS))), x, other)
    return x


@triton.jit
def _side(BIT: tl.constexpr, DIMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A bit of the number of an element of [2, 2, ..]."""
    return tl.reshape(tl.arange(0, 2), [1] * (DIMS - 1 - BIT) + [2] + [1] * BIT)


@triton.jit
def _states(states, row, stride, ok, DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows [.., BLOCK_D] of states, 0 behind DIM and where ok [.., 1] is not; None: all are."""
    d = tl.arange(0, BLOCK_D)
    at = states + row[:, None].to(tl.int64) * stride + d[None, :]
    if ok is None:
        rows = tl.load(at) if DIM == BLOCK_D else tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    else:
        rows = tl.load(at, mask=ok & (d < DIM)[None, :], other=0.0)
    return rows


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    q, beside_q, keys, beside_keys, column, ok, stride_k, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_M, BLOCK_N] of queries q [BLOCK_M, BLOCK_D] and the keys of columns [BLOCK_N]."""
    k = _states(keys, column, stride_k, None if ok is None else ok[:, None], DIM, BLOCK_D)
    scores = tl.dot(q, tl.trans(k.to(COMPUTE)), input_precision="ieee")
    if beside_keys is not None:
        beside_k = tl.load(beside_keys + column) if ok is None else tl.load(beside_keys + column, mask=ok, other=0.0)
        scores += beside_q * beside_k[None, :]
    return scores


@triton.jit
def _bits(hit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words [BLOCK_M, LISTS] int32 of hit [BLOCK_M, BLOCK_N]: bit 2 j + b of word w is that of column 8 j + 2 w + b."""
    PAIRS: tl.constexpr = BLOCK_N // (2 * _LISTS)
    bit = tl.reshape(1 << tl.arange(0, 2 * PAIRS), [1, PAIRS, 1, 2])
    words = tl.where(tl.reshape(hit, [BLOCK_M, PAIRS, _LISTS, 2]), bit, 0)
    return _by_thread(tl.sum(tl.sum(words, 3), 1), BLOCK_M)


@triton.jit
def _by_thread(table, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows of table [BLOCK_M, LISTS] in another order: a thread that holds rows r and r + 8 of a product, as on
    sm_90, holds what it would of any table, and stores it without an exchange."""
    rows = tl.permute(tl.reshape(table, [BLOCK_M // 16, 2, 8, _LISTS]), (1, 0, 2, 3))
    return tl.reshape(rows, [BLOCK_M, _LISTS])


@triton.jit
def _append(hits, lists, count, tile, word, CAPACITY: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = ((tile + tl.zeros([1, 1], tl.int64)) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
    there = word != 0
    tl.store(hits + lists * CAPACITY + count, entry, mask=there & (count < CAPACITY))
    return tl.minimum(count + there.to(tl.int32), CAPACITY + 1)
