"""The tokens of one layer that are not retrieved, estimated by the clusters that they form."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_hub import WeightedPart

from .clusters import cluster_keys
from .index.tensor_file import check_ids, take
from .pinned import rows_on

# Of a cluster, on average: centroids and mean values in the store's type then are less than an eighth of its bytes.
TOKENS_PER_CLUSTER = 10
_TOKENS_PER_SEGMENT = 8192
_ITERATIONS = 5


class CentroidTail:
    """Clusters of the indexed tokens of all sequences, from which each query's retrieved tokens are taken away.

    A cluster stands for its members that were not retrieved: their number as weight, their mean value, and as key the
    mean of all its members. On real traces that kept centroid was as good as the mean key of the rest, or better, and
    it costs no read of the retrieved keys: the query attends to the whole cluster, and a retrieved token takes itself
    off again by its stand-in, the centroid (see WeightedPart). The clusters are those of keys that the prompt's last
    queries can hardly tell apart. Source: RetroInfer's estimation zone (arXiv 2505.02922); the metric, and how what is
    attended to otherwise is taken off, are ours. Numbers of tokens are exact, sums of values to the rounding of their
    mean in the store's type; float32 means would take a twentieth of the store more and did not err less on real
    traces.

    centroids, value_means [B, Hkv, C, D] in the store's type and log_sizes [B, Hkv, C] float32, -inf where no cluster
    is, lie on the layer's device; sizes [B, Hkv, C] float32, 0 where no cluster is, and assignment [B, Hkv, N] int32,
    the cluster of every indexed token, in CPU memory as the tokens. share: of a sequence's clusters, the best of which
    are attended to; 1 is all. grown: batches of so many tokens, (number, size), for which room is kept.
    """

    def __init__(
        self,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        grown: tuple[int, int] = (0, 0),
    ) -> None:
        self.share = 1.0
        self._grown = grown
        self.centroids = torch.zeros(batch_size, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.value_means = torch.zeros_like(self.centroids)
        self.log_sizes = torch.zeros(batch_size, kv_heads, 0, device=device)
        self.sizes = torch.zeros(batch_size, kv_heads, 0)
        self.assignment = torch.zeros(batch_size, kv_heads, 0, dtype=torch.int32)
        self.clusters = [0] * batch_size
        self._tokens = [0] * batch_size
        self._chosen_of: tuple[list[int], Tensor] = ([], torch.empty(0))

    def add(self, sequences: slice, keys: Tensor, values: Tensor, query_moment: Tensor) -> None:
        """Clusters keys and values [b, Hkv, N, D], any device, of the tokens behind those already clustered, of which
        the sequences have equally many.

        query_moment [b * Hkv, D, D]: the mean of q q^T over queries like those to come; see cluster_keys.
        """
        batch, heads, tokens, _ = keys.shape
        device, (segments, number) = self.centroids.device, _counts(tokens)
        keys, values = (rows_on(states.flatten(0, 1), device) for states in (keys, values))
        made = cluster_keys(keys, values, segments, number, _ITERATIONS, query_moment.to(device))
        at, first = self.clusters[sequences][0], self._tokens[sequences][0]
        self._reserve(at + number, first + tokens)
        means = made.value_sums / made.sizes.clamp(min=1)[..., None]
        for table, made_of, begin in (
            (self.centroids, made.centroids, at),
            (self.value_means, means, at),
            (self.sizes, made.sizes, at),
            (self.assignment, made.assignment + at, first),
        ):
            rows = made_of.unflatten(0, (batch, heads))
            table[sequences, :, begin : begin + rows.shape[2]] = rows.to(table.dtype)
        self.clusters[sequences] = [at + number] * batch
        self._tokens[sequences] = [first + tokens] * batch
        self.log_sizes.copy_(self.sizes.log())

    def tables(self) -> dict[str, Tensor]:
        """All that `add` made, for one sequence, under the names of `restore`."""
        clusters, tokens = self.clusters[0], self._tokens[0]
        tables = {name: getattr(self, name)[:, :, :clusters] for name in ("centroids", "value_means", "sizes")}
        return tables | {"assignment": self.assignment[..., :tokens]}

    def restore(self, tensors: dict[str, Tensor], tokens: int) -> None:
        """In place of `add`, for one sequence of so many indexed tokens: takes what `tables` gave out of `tensors`.

        The assignment stays where it is. Raises ValueError for tables that do not fit, or contradict each other.
        """
        _, heads, _, dim = self.centroids.shape
        device, dtype = self.centroids.device, self.centroids.dtype
        self.assignment = take(tensors, "assignment", (1, heads, tokens), torch.int32)
        self.sizes = take(tensors, "sizes", (1, heads, None), torch.float32).clone()
        clusters = self.sizes.shape[2]
        check_ids(self.assignment, "assignment", clusters, start=0)
        members = torch.zeros_like(self.sizes).scatter_add_(
            2, self.assignment.long(), torch.ones(()).expand(self.assignment.shape)
        )
        if not torch.equal(members, self.sizes):
            raise ValueError("sizes: got others than the assignment has members, allowed: as many")
        self.centroids = take(tensors, "centroids", (1, heads, clusters, dim), dtype).to(device)
        self.value_means = take(tensors, "value_means", (1, heads, clusters, dim), dtype).to(device)
        self.clusters, self._tokens = [clusters], [tokens]
        self.log_sizes = self.sizes.log().to(device)

    def part(self, query: Tensor) -> tuple[WeightedPart, Tensor | None]:
        """All clusters, or the best of them for query [B, 1, H, D], as if nothing were retrieved; and which they are,
        [B, Hkv, C] bool, where they are not all."""
        if self.share == 1:
            return WeightedPart(self.centroids, self.value_means, None, self.log_sizes, None), None
        chosen = self._chosen(query)
        weights = self.log_sizes.masked_fill(~chosen, float("-inf"))
        return WeightedPart(self.centroids, self.value_means, None, weights, None), chosen

    @property
    def attended(self) -> int:
        """Clusters of all sequences and kv heads that a query attends to."""
        return self.centroids.shape[1] * sum(round(count * self.share) for count in self.clusters)

    def clusters_of(self, positions: Tensor, first: int, sequences: slice) -> Tensor:
        """The clusters [b, Hkv, T] int32 of the sequences' tokens at positions [b, Hkv, T], the first of which lies at
        `first`; -1 for pads."""
        tokens = (positions - first).clamp(min=0).long()
        return self.assignment[sequences].gather(2, tokens).masked_fill(positions < 0, -1)

    def _chosen(self, query: Tensor) -> Tensor:
        """[B, Hkv, C] bool: the clusters of largest estimated mass, summed over the group's query heads."""
        batch, heads, _, dim = self.centroids.shape
        grouped = query.reshape(batch, heads, -1, dim).float() * dim**-0.5
        logits = grouped @ self.centroids.float().transpose(2, 3) + self.log_sizes[:, :, None]
        mass = logits.softmax(-1).sum(2)
        rank = mass.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        return rank < self.wanted()[:, None, None]

    def wanted(self) -> Tensor:
        """Clusters to attend to of each sequence, [B] on the device; made anew where that changes."""
        wanted = [round(count * self.share) for count in self.clusters]
        if wanted != self._chosen_of[0]:
            self._chosen_of = wanted, torch.tensor(wanted, device=self.log_sizes.device)
        return self._chosen_of[1]

    def _reserve(self, clusters: int, tokens: int) -> None:
        batches, size = self._grown
        for name, wanted, more in (
            ("centroids", clusters, batches * _counts(size)[1]),
            ("value_means", clusters, batches * _counts(size)[1]),
            ("sizes", clusters, batches * _counts(size)[1]),
            ("log_sizes", clusters, batches * _counts(size)[1]),
            ("assignment", tokens, batches * size),
        ):
            table: Tensor = getattr(self, name)
            if wanted > table.shape[2]:
                fresh = table.new_zeros(*table.shape[:2], wanted + more - table.shape[2], *table.shape[3:])
                setattr(self, name, torch.cat((table, fresh), 2))

    @staticmethod
    def expected_bytes(rows: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
        """What `add` makes of so many tokens in each of B * Hkv rows: bytes on the device, and in CPU memory."""
        clusters = rows * _counts(tokens)[1]
        return clusters * (2 * head_dim * dtype.itemsize + 4), 4 * (clusters + rows * tokens)

    @staticmethod
    def most_clusters(tokens: int, new: int, batch: int) -> int:
        """That a sequence ever has, of at most `tokens` of a prompt and of `new` generated ones that enter the index
        `batch` at a time; 0: none does."""
        return max(tokens // TOKENS_PER_CLUSTER, 1) + (new // batch * _counts(batch)[1] if batch else 0)

    @property
    def nbytes(self) -> int:
        tables = (self.centroids, self.value_means, self.log_sizes, self.sizes, self.assignment)
        return sum(table.nbytes for table in tables)


def _counts(tokens: int) -> tuple[int, int]:
    """Segments, and clusters in all of them, of so many tokens."""
    segments = max(round(tokens / _TOKENS_PER_SEGMENT), 1)
    return segments, max(tokens // (TOKENS_PER_CLUSTER * segments), 1) * segments
