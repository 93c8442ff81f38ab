"""Triton kernels of cluster_keys on a GPU: the nearest centroid of every point, and sums over a cluster's members."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A power of two brings the largest element of a centroid near 2 ** 14: its rounding to float16 is then relative, and
# no product of two elements, nor a sum of them in float32, is too large.
_EXPONENT, _LEAST = 14, 2.0**-40
_POINTS, _CENTROIDS, _STAGES = 64, 64, 3
# Of a thread, so that two programs of 256 threads run on a multiprocessor at a time.
_REGISTERS = 128


def nearest_centroid(points: Tensor, centroids: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Cluster [U, m] int32 of the largest <x, c> + offset for points x [U, m, D] and centroids c [U, C, D].

    float32 with contiguous rows, offsets [U, C] float32; all on one GPU, or on the CPU under Triton's interpreter.
    Products are of float16 numbers, summed in float32: a point may go to a centroid that is farther by the rounding
    of both, about 2 ** -11 of the products. Ties go to the smaller index. Scores are never in memory.
    """
    units, count, dim = points.shape
    clusters = centroids.shape[1]
    best = torch.empty(units, count, dtype=torch.int32, device=points.device)
    if not best.numel():
        return best
    # Centroids are means of points, so that one factor does for both.
    most = torch.maximum(_largest(points), _largest(centroids)).clamp(min=_LEAST)
    scale = torch.exp2(_EXPONENT - most.log2().floor())
    half = (centroids * scale).half().contiguous()
    grown = None if offsets is None else (offsets * (scale * scale)).contiguous()
    block_d = max(triton.next_power_of_2(dim), 16)
    shrink = max(block_d // 128, 1)
    block = max(_POINTS // shrink, 16)
    tiles = triton.cdiv(count, block)
    with torch.cuda.device_of(points):
        nearest_centroid_kernel[(units * tiles,)](
            points, half, grown, scale, best, count, clusters, tiles, points.stride(0), points.stride(1),
            DIM=dim, BLOCK_M=block, BLOCK_N=max(_CENTROIDS // shrink, 32), BLOCK_D=block_d,
            COMPUTE=tl.float16 if points.is_cuda else tl.float32, STAGES=_STAGES,
            num_warps=8 if shrink == 1 else 4, maxnreg=_REGISTERS,
        )  # fmt: skip
    return best


def by_cluster(assignment: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Members of every cluster of assignment [U, m]: order [U * m] int64, the points u * m + i by cluster and then by
    number, and begin [U * C + 1] int64, where in it those of a cluster begin."""
    units, device = len(assignment), assignment.device
    flat = assignment.int() + clusters * torch.arange(units, dtype=torch.int32, device=device)[:, None]
    named, order = flat.flatten().sort(stable=True)
    every = torch.arange(units * clusters + 1, dtype=torch.int32, device=device)
    return order, torch.searchsorted(named, every)


def sum_members(points: Tensor, order: Tensor, begin: Tensor) -> Tensor:
    """Sums [U, C, D] float32 of the points [U, m, D], any floating dtype with contiguous rows, of every cluster; order
    and begin as of by_cluster. The same sums in every call."""
    units, count, dim = points.shape
    sums = torch.empty(len(begin) - 1, dim, device=points.device)
    with torch.cuda.device_of(points):
        sum_members_kernel[(len(sums),)](
            points, order, begin, sums, count, points.stride(0), points.stride(1),
            DIM=dim, BLOCK_M=16, BLOCK_D=triton.next_power_of_2(dim), num_warps=2,
        )  # fmt: skip
    return sums.view(units, -1, dim)


def _largest(states: Tensor) -> Tensor:
    """The largest absolute value, without a copy of the states."""
    low, high = states.aminmax()
    return torch.maximum(-low, high)


@triton.jit(do_not_specialize=["count", "clusters", "tiles"])
def nearest_centroid_kernel(  # type: ignore[no-untyped-def]
    points, centroids, offsets, scale, best, count, clusters, tiles, stride_u, stride_m,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M points of one unit. Every place of a tile of scores keeps the best of its column in all
    tiles, and which tile that was; only at the end are the columns compared."""
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < count
    d = tl.arange(0, BLOCK_D)
    at = points + unit * stride_u + row[:, None].to(tl.int64) * stride_m + d[None, :]
    x = tl.load(at, mask=row_ok[:, None] & (d < DIM)[None, :], other=0.0)
    x = (x * tl.load(scale)).to(COMPUTE)
    centroids += unit * clusters * DIM
    if offsets is not None:
        offsets += unit * clusters
    most = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    whole = clusters // BLOCK_N
    for tile in tl.range(0, whole, num_stages=STAGES):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        here = centroids + column[:, None] * DIM + d[None, :]
        c = tl.load(here) if DIM == BLOCK_D else tl.load(here, mask=(d < DIM)[None, :], other=0.0)
        scores = tl.dot(x, tl.trans(c.to(COMPUTE)), input_precision="ieee")
        if offsets is not None:
            scores += tl.load(offsets + column)[None, :]
        better = scores > most
        most = tl.where(better, scores, most)
        where = tl.where(better, tile, where)
    for tile in range(whole, tl.cdiv(clusters, BLOCK_N)):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        ok = column < clusters
        c = tl.load(centroids + column[:, None] * DIM + d[None, :], mask=ok[:, None] & (d < DIM)[None, :], other=0.0)
        scores = tl.dot(x, tl.trans(c.to(COMPUTE)), input_precision="ieee")
        if offsets is not None:
            scores += tl.load(offsets + column, mask=ok, other=0.0)[None, :]
        better = (scores > most) & ok[None, :]
        most = tl.where(better, scores, most)
        where = tl.where(better, tile, where)
    cluster = where * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    cluster = tl.min(tl.where(most == tl.max(most, 1)[:, None], cluster, clusters - 1), 1)
    tl.store(best + unit * count + row, cluster, mask=row_ok)


@triton.jit(do_not_specialize=["count"])
def sum_members_kernel(  # type: ignore[no-untyped-def]
    points, order, begin, sums, count, stride_u, stride_m,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one cluster, BLOCK_M members at a time."""
    cluster = tl.program_id(0).to(tl.int64)
    first = tl.load(begin + cluster)
    stop = tl.load(begin + cluster + 1)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    while first < stop:
        member = first + tl.arange(0, BLOCK_M)
        ok = member < stop
        point = tl.load(order + member, mask=ok, other=0)
        at = points + point // count * stride_u + point % count * stride_m
        total += tl.load(at[:, None] + d[None, :], mask=ok[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
        first += BLOCK_M
    tl.store(sums + cluster * DIM + d, tl.sum(total, 0), mask=d < DIM)
