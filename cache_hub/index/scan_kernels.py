"""The Triton kernels of device_scan, in the order in which they run."""

from __future__ import annotations

import triton
import triton.language as tl

_NOTHING = tl.constexpr(-(2**31))
# What the upper 8 bits of a query's 16 count for.
_UPPER = tl.constexpr(256)


@triton.jit(do_not_specialize=["splits"])
def scan_kernel(  # type: ignore[no-untyped-def]
    query, codes, scales, lengths, scores, maxima, capacity, splits, kv_heads,
    stride_qb, stride_qh,
    DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a split of the keys of one (sequence, kv head), for the GROUP query heads together. Writes scores
    and the maxima of runs of RUN keys; behind the last key up to the end of its tile -inf.

    Scores are those of the query over its largest element, which leaves their order as it is.
    """
    row = tl.program_id(0).to(tl.int64)
    asked = _asked(query, row, kv_heads, stride_qb, stride_qh, DIM, GROUP, BLOCK_G, BLOCK_D)
    dim = tl.arange(0, BLOCK_D)
    dim_ok = (dim < DIM)[None, :]
    length = tl.load(lengths + row)
    tiles = tl.cdiv(length, BLOCK_N)
    each = tl.cdiv(tiles, splits)
    first = tl.program_id(1) * each
    codes += row * capacity * DIM
    scales += row * capacity
    here = row * GROUP + tl.arange(0, BLOCK_G)
    here_ok = (tl.arange(0, BLOCK_G) < GROUP)[None, :]
    runs = capacity // RUN
    for tile in tl.range(first, tl.minimum(first + each, tiles), num_stages=STAGES):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        place = codes + key[:, None].to(tl.int64) * DIM + dim[None, :]
        code = tl.load(place) if DIM == BLOCK_D else tl.load(place, mask=dim_ok, other=0)
        scale = tl.load(scales + key)
        score = _scores(code, scale, key < length, asked, BLOCK_N, BLOCK_G)
        tl.store(scores + here[None, :] * capacity + key[:, None], score, mask=here_ok)
        best = tl.max(tl.reshape(score, [BLOCK_N // RUN, RUN, BLOCK_G]), 1)
        run = tile * (BLOCK_N // RUN) + tl.arange(0, BLOCK_N // RUN)
        tl.store(maxima + here[None, :] * runs + run[:, None], best, mask=here_ok)


@triton.jit
def select_kernel(  # type: ignore[no-untyped-def]
    scores, maxima, lengths, chosen_runs, ids, capacity, k,
    GROUP: tl.constexpr, RUN: tl.constexpr, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: the ids of one query head's k <= WIDTH best keys, ascending, -1 behind them where there are fewer;
    of keys that score the same as the last of them, the lowest ids. What scores -inf is no key; nor is any key of a run
    whose maximum is.

    The k-th largest of the maxima is a score that k keys reach: whatever belongs to the best k lies in the runs whose
    maximum reaches it, or, of those whose maximum it is, in as many as make k. chosen_runs [heads, WIDTH]: room.
    """
    head = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + head // GROUP)
    run = tl.arange(0, BLOCK_R)
    run_ok = run * RUN < length
    most = tl.load(maxima + head * (capacity // RUN) + run, mask=run_ok, other=float("-inf"))
    best = _ordinals(most, most > float("-inf"))
    taken = _reach(best, _nth_largest(best, k, WIDTH), WIDTH)
    room = chosen_runs + head * WIDTH
    tl.store(room + tl.cumsum(taken, 0) - 1, run, mask=taken > 0)
    number = tl.sum(taken, 0)
    tl.debug_barrier()

    slot = tl.arange(0, WIDTH * RUN)
    ok = slot // RUN < number
    key = tl.load(room + slot // RUN, mask=ok, other=0) * RUN + slot % RUN
    ok = ok & (key < length)
    score = tl.load(scores + head * capacity + key, mask=ok, other=float("-inf"))
    score = _ordinals(score, score > float("-inf"))
    taken = _reach(score, _nth_largest(score, k, k), k)
    tl.store(ids + head * k + tl.cumsum(taken, 0) - 1, key, mask=taken > 0)
    place = tl.arange(0, WIDTH)
    tl.store(ids + head * k + place, tl.full([WIDTH], -1, tl.int32), mask=(place >= tl.sum(taken, 0)) & (place < k))


@triton.jit
def unite_kernel(  # type: ignore[no-untyped-def]
    ids, places, tokens, assignment, positions, clusters, counts, query, ring, steps, slots, capacity, ring_size, first,
    k, kv_heads, stride_qb, stride_qh,
    DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, LOG_K: tl.constexpr,
):  # fmt: skip
    """One program: one (sequence, kv head). Positions and clusters of the keys that its query heads found, each once,
    -1 where another has it; adds their number to counts; keeps the query in the ring, if there is one, as the step's.
    An id is a token's number or, where there are places, a slot: of the token tokens[places[slot]].
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_G << LOG_K)
    head, place = slot >> LOG_K, slot & ((1 << LOG_K) - 1)
    ok = (head < GROUP) & (place < k)
    mine = ids + row * GROUP * k
    key = tl.load(mine + head * k + place, mask=ok, other=-1)
    kept = key >= 0
    for other in range(GROUP - 1):
        theirs = mine + other * k
        asks = kept & (other < head)
        below = tl.zeros_like(slot)
        for bit in tl.static_range(LOG_K, -1, -1):
            probe = below + (1 << bit)
            inside = asks & (probe <= k)
            value = tl.load(theirs + probe - 1, mask=inside, other=-1)
            below = tl.where((value >= 0) & (value < key), probe, below)
        kept = kept & (tl.load(theirs + below, mask=asks & (below < k), other=-1) != key)
    out = row * GROUP * k + head * k + place
    token = key
    if places is not None:
        at = tl.load(places + row * slots + key, mask=kept, other=0)
        token = tl.load(tokens + row * capacity + at, mask=kept, other=0)
    tl.store(positions + out, tl.where(kept, token + first, -1), mask=ok)
    if assignment is not None:
        cluster = tl.load(assignment + row * capacity + token, mask=kept, other=-1)
        tl.store(clusters + out, cluster, mask=ok)
    tl.store(counts + row, tl.load(counts + row) + tl.sum(kept.to(tl.int64), 0))
    if ring is not None:
        step = tl.load(steps + row)
        member, dim = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_D)[None, :]
        there = (member < GROUP) & (dim < DIM)
        asked = (row % kv_heads) * GROUP + member
        states = tl.load(query + (row // kv_heads) * stride_qb + asked * stride_qh + dim, mask=there)
        slots = (step % ring_size).to(tl.int64) * tl.num_programs(0) + row
        tl.store(ring + (slots * GROUP + member) * DIM + dim, states, mask=there)
        tl.store(steps + row, step + 1)


@triton.jit
def _asked(  # type: ignore[no-untyped-def]
    query, row, kv_heads, stride_qb, stride_qh,
    DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The row's queries over their largest elements, [BLOCK_D, 2 * BLOCK_G] int8: 16 bits in two of 8, whose products
    with a key's codes lie in columns c and BLOCK_G + c. What the query loses is far less than what the key did."""
    column = tl.arange(0, 2 * BLOCK_G)
    member = column % BLOCK_G
    dim = tl.arange(0, BLOCK_D)
    head = (row % kv_heads) * GROUP + member
    at = query + (row // kv_heads) * stride_qb + head[:, None] * stride_qh + dim[None, :]
    q = tl.load(at, mask=(member < GROUP)[:, None] & (dim < DIM)[None, :], other=0.0).to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)
    q = tl.div_rn(q, tl.div_rn(most, tl.full([2 * BLOCK_G], 127.0, tl.float32))[:, None] + tl.zeros_like(q))
    upper = tl.floor(q + 0.5)
    lower = tl.minimum(tl.floor((q - upper) * _UPPER + 0.5), 127.0)
    return tl.trans(tl.where((column < BLOCK_G)[:, None], upper, lower).to(tl.int8))


@triton.jit
def _scores(code, scale, there, asked, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_N, BLOCK_G] of keys code [BLOCK_N, BLOCK_D] and scale [BLOCK_N], -inf for those that are not there."""
    weight = tl.where(tl.arange(0, 2) == 0, _UPPER, 1)[None, :, None]
    product = tl.dot(code, asked, out_dtype=tl.int32)
    whole = tl.sum(tl.reshape(product, [BLOCK_N, 2, BLOCK_G]) * weight, 1)
    return tl.where(there[:, None], whole.to(tl.float32) * scale[:, None], float("-inf"))


@triton.jit
def _ordinals(score, ok):  # type: ignore[no-untyped-def]
    """Whole numbers in the order of finite scores; the least of all where there is none."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(ok, tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF), _NOTHING)


@triton.jit
def _nth_largest(numbers, n, enough):  # type: ignore[no-untyped-def]
    """A number that at least n of `numbers` [T] reach, and either at most `enough` >= n of them, or of all such numbers
    the largest; where fewer than n are there, the least that is."""
    there = numbers != _NOTHING
    low = tl.min(tl.where(there, numbers, 2**31 - 1), 0).to(tl.int64)
    high = tl.max(numbers, 0).to(tl.int64) + 1
    reach = tl.sum(there.to(tl.int32), 0)
    while (high - low > 1) & (reach > enough):
        middle = (low + high) // 2
        count = tl.sum((numbers >= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(count >= n, middle, low)
        high = tl.where(count >= n, high, middle)
        reach = tl.where(count >= n, count, reach)
    return low.to(tl.int32)


@triton.jit
def _reach(numbers, bound, most):  # type: ignore[no-untyped-def]
    """1 for those of `numbers` [T] above the bound, and for the first that equal it, `most` in all; 0 for others."""
    above = (numbers > bound).to(tl.int32)
    equal = ((numbers == bound) & (numbers != _NOTHING)).to(tl.int32)
    return above + tl.where(tl.cumsum(equal, 0) <= most - tl.sum(above, 0), equal, 0)
