"""Triton kernels of the query links by co-occurrence; co_occurrence.py says what they compute."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS = 256
_LAST = tl.constexpr(2**31 - 1)


def nearest_in_lists(by_time: Tensor, places: Tensor, n: int, width: int) -> Tensor:
    """As co_occurrence.nearest_in_lists, for contiguous lists by_time [T, k], whose weights' sums fit 31 bits."""
    links = torch.full((n, width), -1, dtype=torch.int32, device=by_time.device)
    if links.numel() and by_time.numel():
        with torch.cuda.device_of(by_time):
            nearest_in_lists_kernel[(n,)](
                by_time, places, links, by_time.shape[1], width,
                LISTS=places.shape[1], ROWS=triton.next_power_of_2(places.shape[1]),
                BLOCK_K=triton.next_power_of_2(by_time.shape[1]), num_warps=2,
            )  # fmt: skip
    return links


def first_from(order: Tensor, begin: Tensor, wanted: Tensor, k: int) -> Tensor:
    """As co_occurrence.first_from, for wanted [n, s] int64, contiguous."""
    found = torch.empty_like(wanted)
    if found.numel():
        with torch.cuda.device_of(order):
            first_from_kernel[(triton.cdiv(found.numel(), _PAIRS),)](
                order, begin, wanted, found, found.numel(), wanted.shape[1], k, len(order).bit_length(),
                BLOCK=_PAIRS, num_warps=4,
            )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["k", "width"])
def nearest_in_lists_kernel(  # type: ignore[no-untyped-def]
    by_time, places, links, k, width, LISTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program: one key. A candidate's rank is one number, its weight above its id counted down."""
    key = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ROWS * BLOCK_K)
    row = slot // BLOCK_K
    ids, _ = _members(by_time, places, key, row, slot % BLOCK_K, k, LISTS)
    total = tl.zeros([ROWS * BLOCK_K], tl.int32)
    earlier = tl.zeros([ROWS * BLOCK_K], tl.int32)
    for number in tl.static_range(LISTS):
        rank = tl.arange(0, BLOCK_K)
        others, weights = _members(by_time, places, key, rank * 0 + number, rank, k, LISTS)
        same = ids[:, None] == others[None, :]
        total += tl.sum(tl.where(same, weights[None, :], 0), 1)
        earlier += tl.where(row > number, tl.sum(same.to(tl.int32), 1), 0)
    counts = (ids >= 0) & (earlier == 0)
    left = tl.where(counts, (total.to(tl.int64) << 32) | (ids ^ _LAST).to(tl.int64), -1)
    for place in range(0, width):
        best = tl.max(left, 0)
        chosen = tl.where(best >= 0, best.to(tl.int32) ^ _LAST, -1)
        tl.store(links + key * width + place, chosen)
        left = tl.where(left == best, -1, left)


@triton.jit
def _members(by_time, places, key, row, rank, k, LISTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ids and weights of the members that rank in the lists `row` of those that name the key latest; -1 and 0 for none,
    and for the key itself."""
    place = tl.load(places + key * LISTS + row, mask=row < LISTS, other=-1)
    there = (place >= 0) & (rank < k)
    ids = tl.load(by_time + place // k * k + rank, mask=there, other=-1)
    there = (ids >= 0) & (ids != key)
    gap = tl.abs(rank - (place % k).to(tl.int32))
    return tl.where(there, ids, -1), tl.where(there, 131072 // (2 + gap) + k - rank, 0)


@triton.jit(do_not_specialize=["count", "sampled", "k", "steps"])
def first_from_kernel(  # type: ignore[no-untyped-def]
    order, begin, wanted, found, count, sampled, k, steps, BLOCK: tl.constexpr
):
    """One program: BLOCK searches by halves."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = pair < count
    key = pair // sampled
    low = tl.load(begin + key, mask=ok, other=0)
    high = tl.load(begin + key + 1, mask=ok, other=0)
    least = tl.load(wanted + pair, mask=ok, other=0)
    for _ in range(0, steps):
        middle = (low + high) // 2
        apart = low < high
        less = tl.load(order + middle, mask=apart, other=0) // k < least
        low = tl.where(apart & less, middle + 1, low)
        high = tl.where(apart & (less == 0), middle, high)
    tl.store(found + pair, low, mask=ok)
