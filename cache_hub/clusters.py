"""Segmented spherical k-means over a context's keys: the clusters of RetroInfer's wave index (arXiv 2505.02922)."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from config import cluster_counts

from .index.metric import square_root

# Inner products held at once while keys are assigned on a CPU: 8 MiB stay in its cache.
_SCORES_ON_CPU = 1 << 21
# Elements of float32 keys held at once beside the caller's.
_KEYS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class ClusterCounts:
    """How many clusters a context has, and how many of them a query retrieves and estimates, per kv head."""

    segments: int
    centroids: int
    retrieved: int
    estimated: int

    @classmethod
    def for_length(cls, length: int, retrieval_budget: float, estimation_budget: float) -> ClusterCounts:
        """Counts for a context of `length` tokens; the budgets are shares of the clusters, both in [0, 1].

        At least one cluster is retrieved, and what is retrieved is not estimated too. Raises ValueError for a length
        below 1 or a budget outside [0, 1]. Source: RetroInfer's configuration code.
        """
        if length < 1:
            raise ValueError(f"length: got {length}, allowed: >= 1")
        for name, budget in (("retrieval_budget", retrieval_budget), ("estimation_budget", estimation_budget)):
            if not 0 <= budget <= 1:
                raise ValueError(f"{name}: got {budget}, allowed: 0 to 1")
        segments, centroids = cluster_counts(length)
        retrieved = min(max(round(centroids * retrieval_budget), 1), centroids)
        estimated = min(round(centroids * estimation_budget), centroids - retrieved)
        return cls(segments, centroids, retrieved, estimated)

    def __add__(self, other: ClusterCounts) -> ClusterCounts:
        return ClusterCounts(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Clusters:
    """Clusters of the keys of R = batch * kv_heads rows, each row's own.

    centroids [R, C, D] float32: mean of the member keys; of an empty cluster a stale direction plus the mean key.
    sizes [R, C] int32: number of members; 0 where empty.
    value_sums [R, C, D] float32: sum of the members' values.
    assignment [R, N] int32: the cluster of every key.
    """

    centroids: Tensor
    sizes: Tensor
    value_sums: Tensor
    assignment: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.centroids, self.sizes, self.value_sums, self.assignment))


@torch.no_grad()
def cluster_keys(
    keys: Tensor,
    values: Tensor,
    segments: int,
    centroids: int,
    iterations: int = 10,
    query_moment: Tensor | None = None,
) -> Clusters:
    """Clusters keys [R, N, D], any floating dtype, into `centroids` clusters a row, in float32 on the keys' device.

    Spherical k-means on the keys minus their mean, starting from evenly spaced keys: `iterations` - 1 rounds inside
    each of `segments` runs of consecutive keys, then one assignment of every key to the best of all centroids, whose
    plain means are the result. Keys left over behind the last segment take part in that assignment only. values
    [R, N, D] are summed by cluster. Nothing is drawn at random; ties go to the smaller index; the scores held at once
    are bounded, whatever N is. Source: RetroInfer, section on the wave index.

    query_moment [R, D, D], the mean of q q^T over queries: then it is k-means (not spherical) under the distance
    x^T E[q q^T] x, the mean square by which the logits of two keys differ. That variance inside a cluster is what its
    centroid misses, and on real traces the estimate erred by 5 to 22 % less (mean).

    Raises ValueError for shapes that do not fit, centroids that segments does not divide, segments of fewer keys than
    centroids, or fewer than one iteration.
    """
    _check(keys, values, segments, centroids, iterations)
    rows, count, dim = keys.shape
    result = Clusters(
        centroids=keys.new_empty(rows, centroids, dim, dtype=torch.float32),
        sizes=keys.new_empty(rows, centroids, dtype=torch.int32),
        value_sums=keys.new_empty(rows, centroids, dim, dtype=torch.float32),
        assignment=keys.new_empty(rows, count, dtype=torch.int32),
    )
    step = max(_KEYS_AT_ONCE // (count * dim), 1)
    for first in range(0, rows, step):
        block = slice(first, first + step)
        # A GPU's kernels read contiguous rows; keys may come with their heads between their tokens.
        points = keys[block].float().contiguous()
        mean = points.mean(1, keepdim=True)
        points = points - mean
        if query_moment is None:
            directions = _directions(points, segments, centroids, iterations, lifted=False)
            assignment = _assign(points, directions, lifted=False)
        else:
            # As inner products: |x - c|^2 is least where <x, c> - |c|^2 / 2 is largest.
            # Eigenvectors take a CPU milliseconds, a GPU tens of them.
            root = square_root(query_moment[block].cpu()).to(points)
            seen = F.pad(points @ root, (0, 1), value=1.0)
            assignment = _assign(seen, _directions(seen, segments, centroids, iterations, lifted=True), lifted=True)
            directions = torch.zeros_like(result.centroids[block])
        (sums, value_sums), sizes = _sum_members((points, values[block]), assignment, centroids)
        means = torch.where(sizes[..., None] > 0, sums / sizes.clamp(min=1)[..., None], directions)
        result.centroids[block] = means + mean
        result.sizes[block] = sizes
        result.value_sums[block] = value_sums
        result.assignment[block] = assignment
    return result


def _with_half_square(means: Tensor) -> Tensor:
    """Means of points that end with a 1, ready for _assign: the 1 becomes -|c|^2 / 2."""
    return torch.cat((means[..., :-1], -0.5 * means[..., :-1].square().sum(-1, keepdim=True)), -1)


def _directions(points: Tensor, segments: int, centroids: int, iterations: int, lifted: bool) -> Tensor:
    """Centroids [R, C, D] of points [R, N, D] after all rounds but the last; lifted: as _assign takes them."""
    rows, count, dim = points.shape
    # floor((i + 0.5) N / C) in integers
    start = (2 * torch.arange(centroids, device=points.device) + 1) * count // (2 * centroids)
    each = count // segments
    first = points[:, start]
    directions = _with_half_square(first) if lifted else first
    directions = directions.view(rows * segments, centroids // segments, dim)
    parts = points[:, : segments * each].reshape(rows * segments, each, dim)
    for _ in range(iterations - 1):
        assignment = _assign(parts, directions, lifted)
        (sums,), sizes = _sum_members((parts,), assignment, centroids // segments)
        means = sums / sizes.clamp(min=1)[..., None]
        finished = _with_half_square(means) if lifted else F.normalize(means, dim=-1)
        directions = torch.where(sizes[..., None] > 0, finished, directions)
    return directions.view(rows, centroids, dim)


def _assign(points: Tensor, directions: Tensor, lifted: bool) -> Tensor:
    """Cluster [U, m], int64 or int32, of the largest inner product for points [U, m, D] and directions [U, C, D].

    lifted: the points end with a 1, the directions with what that adds to the product. On a GPU the others' products
    are those of nearest_centroid, which rounds them.
    """
    if points.is_cuda:
        from .cluster_kernels import nearest_centroid  # Triton only where it is used

        if lifted:
            return nearest_centroid(points[..., :-1], directions[..., :-1], directions[..., -1])
        return nearest_centroid(points, directions)
    units, count, _ = points.shape
    clusters = directions.shape[1]
    best = torch.empty(units, count, dtype=torch.int64)
    wide = max(_SCORES_ON_CPU // (clusters * count), 1)
    long = min(max(_SCORES_ON_CPU // clusters, 1), count)
    for u in range(0, units, wide):
        transposed = directions[u : u + wide].transpose(1, 2)
        for i in range(0, count, long):
            best[u : u + wide, i : i + long] = (points[u : u + wide, i : i + long] @ transposed).max(-1).indices
    return best


def _sum_members(states: tuple[Tensor, ...], assignment: Tensor, clusters: int) -> tuple[list[Tensor], Tensor]:
    """Sums [U, C, D] float32 of each of the states [U, m, D], and numbers [U, C], of what assignment [U, m] puts into
    each cluster."""
    units = len(assignment)
    if assignment.is_cuda:  # index_add_ adds in whatever order its threads come
        from .cluster_kernels import by_cluster, sum_members  # Triton only where it is used

        order, begin = by_cluster(assignment, clusters)
        return [sum_members(some, order, begin) for some in states], begin.diff().view(units, clusters)
    flat = (assignment + clusters * torch.arange(units)[:, None]).flatten()
    sums = [
        torch.zeros(units * clusters, some.shape[2]).index_add_(0, flat, some.float().reshape(-1, some.shape[2]))
        for some in states
    ]
    sizes = flat.bincount(minlength=units * clusters)
    return [one.view(units, clusters, -1) for one in sums], sizes.view(units, clusters)


def _check(keys: Tensor, values: Tensor, segments: int, centroids: int, iterations: int) -> None:
    if keys.dim() != 3 or keys.shape != values.shape or not keys.is_floating_point():
        raise ValueError(
            f"keys, values: got {keys.dtype} {list(keys.shape)}, {values.dtype} {list(values.shape)}, allowed: "
            "floating, both [R, N, D]"
        )
    count = keys.shape[1]
    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}, allowed: >= 1")
    if segments < 1 or centroids < 1 or centroids % segments:
        raise ValueError(
            f"centroids, segments: got {centroids}, {segments}, allowed: both >= 1, centroids a multiple of segments"
        )
    if centroids > count // segments * segments:
        raise ValueError(
            f"centroids: got {centroids} in {segments} segments, allowed: at most {count // segments * segments}, one "
            f"for every key in segments of {count // segments}"
        )
