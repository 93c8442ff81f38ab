"""The Triton kernels of pruned_scan, in the order in which they run."""

from __future__ import annotations

import triton
import triton.language as tl

from .scan_kernels import _NOTHING, _asked, _nth_largest, _ordinals, _scores

# Keys of a cluster whose places are written at a time.
_LANES = tl.constexpr(16)


@triton.jit
def rank_clusters_kernel(  # type: ignore[no-untyped-def]
    query, centroids, starts, ranks, clusters, capacity, kv_heads, stride_qb, stride_qh,
    DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C clusters of one (sequence, kv head), for the GROUP query heads together. Writes ranks, the
    inner products of query and centroid; -inf for clusters that have no keys."""
    row = tl.program_id(0).to(tl.int64)
    cluster = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = cluster < clusters
    begin = starts + row * (clusters + 1) + cluster
    there = ok & (tl.load(begin, mask=ok, other=0) < tl.load(begin + 1, mask=ok, other=0))
    dim = tl.arange(0, BLOCK_D)
    place = centroids + (row * capacity + cluster[:, None]) * DIM + dim[None, :]
    centroid = tl.load(place, mask=there[:, None] & (dim < DIM)[None, :], other=0.0).to(COMPUTE)
    member = tl.arange(0, BLOCK_G)
    member_ok = member < GROUP
    head = (row % kv_heads) * GROUP + member
    at = query + (row // kv_heads) * stride_qb + head[None, :] * stride_qh + dim[:, None]
    q = tl.load(at, mask=member_ok[None, :] & (dim < DIM)[:, None], other=0.0).to(COMPUTE)
    score = tl.where(there[:, None], tl.dot(centroid, q, input_precision="ieee"), float("-inf"))
    out = ranks + (row * GROUP + member[None, :]) * clusters + cluster[:, None]
    tl.store(out, score, mask=ok[:, None] & member_ok[None, :])


@triton.jit
def bound_kernel(  # type: ignore[no-untyped-def]
    ranks, wanted, bounds, clusters, GROUP: tl.constexpr, EVERY: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the ordinal that a query head's clusters must reach to be chosen. The wanted number of them do, or
    up to an eighth more, of every EVERY-th cluster a like share; all, where that is as many as there are."""
    head = tl.program_id(0).to(tl.int64)
    cluster = tl.arange(0, BLOCK) * EVERY
    rank = tl.load(ranks + head * clusters + cluster, mask=cluster < clusters, other=float("-inf"))
    there = rank > float("-inf")
    number = tl.cdiv(tl.load(wanted + head // GROUP), EVERY)
    bound = _nth_largest(_ordinals(rank, there), number, number + number // 8)
    tl.store(bounds + head, tl.where(tl.sum(there.to(tl.int32), 0) > number, bound, _NOTHING))


@triton.jit(do_not_specialize=["splits"])
def scan_chosen_kernel(  # type: ignore[no-untyped-def]
    query, codes, scales, starts, ranks, bounds, places, scores, maxima, ends, counts, scanned, clusters, capacity,
    slots, splits, kv_heads, stride_qb, stride_qh,
    DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a split of BLOCK_C clusters of one (sequence, kv head). Writes, for the keys of those that any of
    the GROUP query heads has chosen, places and scores [slots], side by side from the split's first slot on, which
    depends on `starts` alone; the maxima of runs of RUN slots up to the next split's; how many keys these are, counts
    [splits], and the sum of it over all calls, scanned [splits]. ends: where the slots of the last split do."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    starts += row * (clusters + 1)
    cluster = split * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = cluster < clusters
    begin = tl.load(starts + cluster, mask=ok, other=0)
    end = tl.load(starts + cluster + 1, mask=ok, other=0)
    chosen = tl.zeros([BLOCK_C], tl.int32)
    for member in tl.static_range(GROUP):
        head = row * GROUP + member
        rank = tl.load(ranks + head * clusters + cluster, mask=ok, other=float("-inf"))
        there = rank > float("-inf")
        chosen = chosen | (there & (_ordinals(rank, there) >= tl.load(bounds + head))).to(tl.int32)
    size = tl.where(chosen > 0, end - begin, 0)
    slot = tl.cumsum(size, 0) - size
    count = tl.sum(size, 0)
    first = (tl.load(starts + split * BLOCK_C) + split * RUN) // RUN * RUN
    until = tl.load(starts + tl.minimum((split + 1) * BLOCK_C, clusters))
    until = (until + (split + 1) * RUN) // RUN * RUN
    places += row * slots + first
    lane = tl.arange(0, _LANES)[None, :]
    for done in range(0, tl.max(size, 0), _LANES):
        key = done + lane
        tl.store(places + slot[:, None] + key, begin[:, None] + key, mask=key < size[:, None])
    tl.debug_barrier()

    asked = _asked(query, row, kv_heads, stride_qb, stride_qh, DIM, GROUP, BLOCK_G, BLOCK_D)
    dim = tl.arange(0, BLOCK_D)
    codes += row * capacity * DIM
    scales += row * capacity
    here = row * GROUP + tl.arange(0, BLOCK_G)
    here_ok = (tl.arange(0, BLOCK_G) < GROUP)[None, :]
    scores += here[None, :] * slots + first
    maxima += here[None, :] * (slots // RUN) + first // RUN
    filled = tl.cdiv(count, RUN)
    for tile in tl.range(0, tl.cdiv(count, BLOCK_N), num_stages=STAGES):
        found = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        found_ok = found < count
        key = tl.load(places + found, mask=found_ok, other=0)
        place = codes + key[:, None].to(tl.int64) * DIM + dim[None, :]
        code = tl.load(place, mask=found_ok[:, None] & (dim < DIM)[None, :], other=0)
        scale = tl.load(scales + key, mask=found_ok, other=0.0)
        score = _scores(code, scale, found_ok, asked, BLOCK_N, BLOCK_G)
        tl.store(scores + found[:, None], score, mask=here_ok & (found < filled * RUN)[:, None])
        best = tl.max(tl.reshape(score, [BLOCK_N // RUN, RUN, BLOCK_G]), 1)
        run = tile * (BLOCK_N // RUN) + tl.arange(0, BLOCK_N // RUN)
        tl.store(maxima + run[:, None], best, mask=here_ok & (run < filled)[:, None])
    nothing = tl.full([_LANES, BLOCK_G], float("-inf"), tl.float32)
    for empty in range(filled, (until - first) // RUN, _LANES):
        run = empty + tl.arange(0, _LANES)
        tl.store(maxima + run[:, None], nothing, mask=here_ok & (run < (until - first) // RUN)[:, None])
    tl.store(counts + row * splits + split, count)
    total = scanned + row * splits + split
    tl.store(total, tl.load(total) + count)
    tl.store(ends + row, until, mask=split == splits - 1)
