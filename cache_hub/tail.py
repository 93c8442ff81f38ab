"""The tokens of one layer that are not retrieved, estimated by the clusters that they form."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_hub import WeightedPart

from .clusters import cluster_keys

# Of a cluster, on average: centroids and mean values in the store's type then are less than an eighth of its bytes.
TOKENS_PER_CLUSTER = 10
_TOKENS_PER_SEGMENT = 8192
_ITERATIONS = 5


class CentroidTail:
    """Clusters of the indexed tokens of all sequences, from which each query's retrieved tokens are taken away.

    A cluster stands for its members that were not retrieved: their number as weight, their mean value, and as key the
    mean of all its members. On real traces that kept centroid was as good as the mean key of the rest, or better, and
    it costs no read of the retrieved keys. The clusters are those of keys that the prompt's last queries can hardly
    tell apart. Source: RetroInfer's estimation zone (arXiv 2505.02922); the metric, and the bookkeeping of what is
    attended to otherwise, are ours. Numbers of tokens are exact, sums of values to the rounding of their mean in the
    store's type; float32 means would take a twentieth of the store more and did not err less on real traces.

    centroids, value_means [B, Hkv, C, D] in the store's type and sizes [B, Hkv, C] float32, 0 where no cluster is, lie
    on the layer's device; assignment [B, Hkv, N] int32, the cluster of every indexed token, in CPU memory as the
    tokens. share: of a sequence's clusters, the best of which are attended to; 1 is all.
    """

    def __init__(
        self,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.share = 1.0
        self.centroids = torch.zeros(batch_size, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.value_means = torch.zeros_like(self.centroids)
        self.sizes = torch.zeros(batch_size, kv_heads, 0, device=device)
        self.assignment = torch.zeros(batch_size, kv_heads, 0, dtype=torch.int32)
        self.clusters = [0] * batch_size
        self._sizes_here = self.sizes.cpu()

    def add(self, sequences: slice, keys: Tensor, values: Tensor, query_moment: Tensor) -> None:
        """Clusters keys and values [b, Hkv, N, D], any device, of sequences that have none yet.

        query_moment [b * Hkv, D, D]: the mean of q q^T over queries like those to come; see cluster_keys.
        """
        batch, heads, tokens, _ = keys.shape
        device, segments = self.centroids.device, max(round(tokens / _TOKENS_PER_SEGMENT), 1)
        number = max(tokens // (TOKENS_PER_CLUSTER * segments), 1) * segments
        there = keys.flatten(0, 1).to(device), values.flatten(0, 1).to(device)
        made = cluster_keys(*there, segments, number, _ITERATIONS, query_moment.to(device))
        self._reserve(number, tokens)
        means = made.value_sums / made.sizes.clamp(min=1)[..., None]
        for table, made_of in (
            (self.centroids, made.centroids),
            (self.value_means, means),
            (self.sizes, made.sizes),
            (self.assignment, made.assignment),
        ):
            rows = made_of.unflatten(0, (batch, heads))
            table[sequences, :, : rows.shape[2]] = rows.to(table.dtype)
        self.clusters[sequences] = [number] * batch
        self._sizes_here = self.sizes.cpu()

    def parts(self, query: Tensor, ids: Tensor, values: Tensor) -> tuple[list[WeightedPart], int]:
        """The rest of the tokens for query [B, 1, H, D], and how many clusters stand for it.

        ids [B, Hkv, T]: the indexed tokens attended to exactly, none twice, -1 pads; values [B, Hkv, T, D]: theirs, of
        any content where padded; both in CPU memory. Parts: the clusters as they are, and those that lost members.
        """
        device, number = self.sizes.device, self.sizes.shape[2]
        losses = self._lost(ids, values)
        touched, lost, lost_values = (table.to(device, non_blocking=True) for table in losses)
        used = touched < number
        at = touched.clamp(max=number - 1)
        wide = at[..., None].expand(*at.shape, self.centroids.shape[3])
        sizes = self.sizes.gather(2, at)
        left = (sizes - lost).masked_fill_(~used, 0)
        means = self.value_means.gather(2, wide).float() * sizes[..., None] - lost_values
        means = means / left.clamp(min=1)[..., None]
        whole = torch.nn.functional.pad(self.sizes, (0, 1)).scatter_(2, touched, 0)[..., :number]
        if self.share < 1:
            chosen = self._chosen(query)
            whole = whole * chosen
            left = left * chosen.gather(2, at)
            count = int((whole > 0).sum() + (left > 0).sum())
        else:
            count = self._count_left(*losses[:2])
        parts = [
            WeightedPart(self.centroids, self.value_means, None, whole.log(), None),
            WeightedPart(self.centroids.gather(2, wide), means.to(self.value_means.dtype), None, left.log(), None),
        ]
        return parts, count

    def _count_left(self, touched: Tensor, lost: Tensor) -> int:
        """Clusters that keep a member; arguments as _lost returns them."""
        sizes = torch.nn.functional.pad(self._sizes_here, (0, 1), value=float("inf")).gather(2, touched)
        return int((self._sizes_here > 0).sum() - (sizes <= lost).sum())

    def _lost(self, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the clusters lose to ids and values as in `parts`: clusters [B, Hkv, T] int64, each once, C where there
        is none; how many members [B, Hkv, T] float32; the sum of their values [B, Hkv, T, D] float32."""
        number = self.sizes.shape[2]
        cluster = self.assignment.gather(2, ids.clamp(min=0).long()).long().masked_fill_(ids < 0, number)
        cluster, order = cluster.sort(dim=2)
        starts = cluster.diff(dim=2, prepend=torch.full_like(cluster[..., :1], -1)) != 0
        slot = starts.cumsum(2) - 1
        member = (cluster < number).float()
        lost = torch.zeros_like(member).scatter_add_(2, slot, member)
        batch, heads, tokens, dim = values.shape
        row = torch.arange(batch * heads).view(batch, heads, 1) * tokens
        rows = values.view(-1, dim).index_select(0, (row + order).flatten()).float() * member.view(-1, 1)
        lost_values = rows.new_zeros(rows.shape).index_add_(0, (row + slot).flatten(), rows).view(values.shape)
        return torch.full_like(cluster, number).scatter_(2, slot, cluster), lost, lost_values

    def _chosen(self, query: Tensor) -> Tensor:
        """[B, Hkv, C] bool: the clusters of largest estimated mass, summed over the group's query heads."""
        batch, heads, _, dim = self.centroids.shape
        grouped = query.reshape(batch, heads, -1, dim).float() * dim**-0.5
        logits = grouped @ self.centroids.float().transpose(2, 3) + self.sizes.log()[:, :, None]
        mass = logits.softmax(-1).sum(2)
        rank = mass.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        wanted = torch.tensor([round(count * self.share) for count in self.clusters], device=rank.device)
        return rank < wanted[:, None, None]

    def _reserve(self, clusters: int, tokens: int) -> None:
        for name, wanted in (
            ("centroids", clusters),
            ("value_means", clusters),
            ("sizes", clusters),
            ("assignment", tokens),
        ):
            table: Tensor = getattr(self, name)
            if wanted > table.shape[2]:
                more = table.new_zeros(*table.shape[:2], wanted - table.shape[2], *table.shape[3:])
                setattr(self, name, torch.cat((table, more), 2))

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in (self.centroids, self.value_means, self.sizes, self.assignment))
