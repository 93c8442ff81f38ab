"""The wave index of one layer: members laid out cluster by cluster, and what stands for each cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_hub import WeightedPart

from .clusters import ClusterCounts, Clusters
from .pinned import pinned_empty


@dataclass
class Selection:
    """Clusters that a query retrieves [B, Hkv, P] and estimates [B, Hkv, E], best first, int64, -1 pads.

    members: of all the retrieved clusters together; most_members: of a kv head's at most; estimates: estimated
    clusters, all together.
    """

    retrieved: Tensor
    estimated: Tensor
    members: int
    most_members: int
    estimates: int


class WaveIndex:
    """Clusters and their members for all sequences of a batch; sequences may hold different numbers of both.

    keys, values [B, Hkv, rows, D], the members: in CPU memory (pinned beside a GPU), or on `device` if `on_device`.
    centroids, value_means [B, Hkv, C, D] in `dtype`, sizes and first_rows [B, Hkv, C] int32, all on `device`: cluster
    i holds the rows first_rows[i] .. first_rows[i] + sizes[i] - 1. counts: per sequence, summed over all that `add`
    took. spare: clusters to make room for beside those of the prompt.
    """

    def __init__(
        self,
        batch_size: int,
        kv_heads: int,
        rows: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        spare: int = 0,
        on_device: bool = False,
    ) -> None:
        shape = (batch_size, kv_heads, rows, head_dim)
        place = device if on_device else torch.device("cpu")
        pinned = device.type == "cuda" and not on_device
        self.keys, self.values = (
            pinned_empty(shape, dtype) if pinned else torch.empty(shape, dtype=dtype, device=place) for _ in range(2)
        )
        self.centroids, self.value_means = (
            torch.zeros(batch_size, kv_heads, 0, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        self.sizes, self.first_rows = (
            torch.zeros(batch_size, kv_heads, 0, dtype=torch.int32, device=device) for _ in range(2)
        )
        self.counts = [ClusterCounts(0, 0, 0, 0)] * batch_size
        self.stored = [0] * batch_size
        self._spare = spare

    def add(self, sequences: slice, keys: Tensor, values: Tensor, clusters: Clusters, counts: ClusterCounts) -> None:
        """Appends clusters of the tokens keys, values [b, Hkv, N, D] to sequences that hold equally much.

        clusters: of the b * Hkv rows of these tokens, with counts.centroids clusters each; the other counts add to
        what the sequences' queries retrieve and estimate.
        """
        batch, heads, count, _ = keys.shape
        at, held = self.stored[sequences.start], self.counts[sequences.start]
        order = clusters.assignment.argsort(dim=1, stable=True).view(batch, heads, count, 1)
        for states, store in ((keys, self.keys), (values, self.values)):
            store[sequences, :, at : at + count] = states.take_along_dim(order, 2)
        self._reserve(held.centroids + counts.centroids)
        new = slice(held.centroids, held.centroids + counts.centroids)
        sizes = clusters.sizes.view(batch, heads, -1)
        means = clusters.value_sums.view(batch, heads, counts.centroids, -1) / sizes.clamp(min=1)[..., None]
        self.centroids[sequences, :, new] = clusters.centroids.view_as(means).to(self.centroids.dtype)
        self.value_means[sequences, :, new] = means.to(self.value_means.dtype)
        self.sizes[sequences, :, new] = sizes
        self.first_rows[sequences, :, new] = (at + sizes.cumsum(2) - sizes).int()
        self.counts[sequences] = [held + counts] * batch
        self.stored[sequences] = [at + count] * batch
        self._tabulate()

    def select(self, query: Tensor) -> Selection:
        """The clusters for query [B, 1, H, D], shared by the g query heads of a kv head.

        Clusters are ranked by their softmax weight among all centroids, summed over the group; sizes play no part, and
        an empty cluster ranks last.
        """
        batch, heads, _, dim = self.centroids.shape
        grouped = query.reshape(batch, heads, -1, dim).float() * dim**-0.5
        logits = grouped @ self.centroids.float().transpose(2, 3)
        score = logits.masked_fill_(self._unused, -torch.inf).softmax(-1).sum(2)
        best = score.masked_fill_(self.sizes == 0, -1).topk(self._most, dim=-1).indices
        sizes = self.sizes.gather(2, best)
        filled = sizes > 0
        exact, rest = self._exact & filled, self._rest & filled
        most = max(counts.retrieved for counts in self.counts)
        least = min(counts.retrieved for counts in self.counts)
        # One transfer to the host for all numbers.
        members, estimates = torch.stack(((sizes * exact).sum(2), rest.sum(2))).flatten(1).tolist()
        return Selection(
            torch.where(exact, best, -1)[..., :most],
            torch.where(rest, best, -1)[..., least:],
            sum(members),
            max(members),
            sum(estimates),
        )

    def rows_of(self, clusters: Tensor, most: int | None = None) -> Tensor:
        """Rows of the members of clusters [B, Hkv, P] (-1 pads) -> [B, Hkv, T] int64, -1 pads; most: T, if known."""
        at = clusters.clamp(min=0)
        sizes = self.sizes.gather(2, at).masked_fill(clusters < 0, 0)
        which, place = expand_runs(sizes, most)
        first_rows = self.first_rows.gather(2, at).gather(2, which.clamp(min=0))
        return torch.where(which >= 0, first_rows + place, -1)

    def retrieved_part(self, rows: Tensor) -> WeightedPart:
        """Rows [B, Hkv, T] of the members, attended exactly."""
        return WeightedPart(self.keys, self.values, rows, None, None)

    def estimated_part(self, clusters: Tensor) -> WeightedPart:
        """Clusters [B, Hkv, E], each standing for its members by its centroid, its mean value and its size."""
        sizes = self.sizes.gather(2, clusters.clamp(min=0)).clamp(min=1)
        return WeightedPart(self.centroids, self.value_means, clusters, sizes.float().log(), None)

    @property
    def nbytes(self) -> int:
        """Bytes of everything beside the members."""
        return sum(t.nbytes for t in (self.centroids, self.value_means, self.sizes, self.first_rows))

    def _reserve(self, clusters: int) -> None:
        more = clusters + self._spare - self.sizes.shape[2]
        if clusters <= self.sizes.shape[2]:
            return
        for name in ("centroids", "value_means", "sizes", "first_rows"):
            table: Tensor = getattr(self, name)
            rest = table.new_zeros(*table.shape[:2], more, *table.shape[3:])
            setattr(self, name, torch.cat((table, rest), 2))

    def _tabulate(self) -> None:
        """The counts as masks: places [B, 1, most] of a ranking that are retrieved, and that are estimated; clusters
        [B, 1, 1, C] not in use."""
        device = self.sizes.device
        column = lambda numbers: torch.tensor(numbers, device=device).view(-1, 1, 1)  # noqa: E731
        self._most = max(counts.retrieved + counts.estimated for counts in self.counts)
        rank = torch.arange(self._most, device=device)
        self._exact = rank < column([counts.retrieved for counts in self.counts])
        self._rest = ~self._exact & (rank < column([counts.retrieved + counts.estimated for counts in self.counts]))
        used = column([counts.centroids for counts in self.counts])[..., None]
        self._unused = torch.arange(self.sizes.shape[2], device=device) >= used


def expand_runs(lengths: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The members of runs one after the other, runs of `lengths` [B, Hkv, P] each: the run that a member belongs to
    (-1 pads) and its place in it, both [B, Hkv, T] int64, T = `most` the longest sum of lengths."""
    ends = lengths.cumsum(2)
    slots = (
        torch.arange(int(ends[..., -1].max()) if most is None else most, device=ends.device)
        .expand(*ends.shape[:2], -1)
        .contiguous()
    )
    which = torch.searchsorted(ends, slots, right=True)
    inside = which < lengths.shape[2]
    which.clamp_(max=lengths.shape[2] - 1)
    place = slots - (ends - lengths).gather(2, which)
    return torch.where(inside, which, -1), torch.where(inside, place, 0)
