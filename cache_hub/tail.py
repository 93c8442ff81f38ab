"""The tokens of one layer that are not retrieved, estimated by the clusters that they form."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_hub import WeightedPart

from .clusters import cluster_keys
from .index import _native
from .index.key_store import as_key_store
from .index.tensor_file import check_ids, take

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

    centroids, value_means [B, Hkv, C, D] in the store's type and log_sizes [B, Hkv, C] float32, -inf where no cluster
    is, lie on the layer's device; sizes [B, Hkv, C] float32, 0 where no cluster is, and assignment [B, Hkv, N] int32,
    the cluster of every indexed token, in CPU memory as the tokens. The last of the C is no cluster: pads mean it.
    share: of a sequence's clusters, the best of which are attended to; 1 is all. num_threads: on the CPU; None is
    torch's own count.
    """

    def __init__(
        self,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        num_threads: int | None = None,
    ) -> None:
        self.share = 1.0
        self.num_threads = num_threads or torch.get_num_threads()
        self.centroids = torch.zeros(batch_size, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.value_means = torch.zeros_like(self.centroids)
        self.log_sizes = torch.zeros(batch_size, kv_heads, 0, device=device)
        self.sizes = torch.zeros(batch_size, kv_heads, 0)
        self.assignment = torch.zeros(batch_size, kv_heads, 0, dtype=torch.int32)
        self.clusters = [0] * batch_size
        self._tokens = [0] * batch_size

    def add(self, sequences: slice, keys: Tensor, values: Tensor, query_moment: Tensor) -> None:
        """Clusters keys and values [b, Hkv, N, D], any device, of the tokens behind those already clustered, of which
        the sequences have equally many.

        query_moment [b * Hkv, D, D]: the mean of q q^T over queries like those to come; see cluster_keys.
        """
        batch, heads, tokens, _ = keys.shape
        device, (segments, number) = self.centroids.device, _counts(tokens)
        there = keys.flatten(0, 1).to(device), values.flatten(0, 1).to(device)
        made = cluster_keys(*there, segments, number, _ITERATIONS, query_moment.to(device))
        at, first = self.clusters[sequences][0], self._tokens[sequences][0]
        self._reserve(at + number + 1, first + tokens)
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
        self.log_sizes = self.sizes.log().to(device)

    def tables(self) -> dict[str, Tensor]:
        """All that `add` made, for one sequence, under the names of `restore`."""
        return {name: getattr(self, name) for name in ("centroids", "value_means", "sizes", "assignment")}

    def restore(self, tensors: dict[str, Tensor], tokens: int) -> None:
        """In place of `add`, for one sequence of so many indexed tokens: takes what `tables` gave out of `tensors`.

        The assignment stays where it is. Raises ValueError for tables that do not fit, or contradict each other.
        """
        _, heads, _, dim = self.centroids.shape
        device, dtype = self.centroids.device, self.centroids.dtype
        self.assignment = take(tensors, "assignment", (1, heads, tokens), torch.int32)
        self.sizes = take(tensors, "sizes", (1, heads, None), torch.float32).clone()
        clusters = self.sizes.shape[2]
        check_ids(self.assignment, "assignment", clusters - 1, start=0)
        members = torch.zeros_like(self.sizes).scatter_add_(
            2, self.assignment.long(), torch.ones(()).expand(self.assignment.shape)
        )
        if not torch.equal(members, self.sizes):
            raise ValueError("sizes: got others than the assignment has members, allowed: as many")
        self.centroids = take(tensors, "centroids", (1, heads, clusters, dim), dtype).to(device)
        self.value_means = take(tensors, "value_means", (1, heads, clusters, dim), dtype).to(device)
        self.clusters = [max(clusters - 1, 0)]
        self.log_sizes = self.sizes.log().to(device)

    def parts(self, query: Tensor, positions: Tensor, values: Tensor, first: int) -> tuple[list[WeightedPart], int]:
        """The rest of the tokens for query [B, 1, H, D], and how many clusters stand for it.

        positions [B, Hkv, T] int32, contiguous: where in values [B, Hkv, L, D], the store, the indexed tokens attended
        to exactly lie, none twice, -1 pads; first: where the first indexed token lies. Both tensors in CPU memory.
        Parts: the clusters as they are, and those that lost members. ValueError where a position is not an indexed one.
        """
        (touched, log_left, scale, lost_mean), count = self._take_away(positions, values, first)
        whole = self.log_sizes.flatten().index_fill(0, touched, float("-inf")).view_as(self.log_sizes)
        if self.share < 1:
            chosen = self._chosen(query)
            whole = whole.masked_fill(~chosen, float("-inf"))
            log_left = log_left.masked_fill(~chosen.take(touched).view_as(log_left), float("-inf"))
            count = int(whole.isfinite().sum() + log_left.isfinite().sum())
        keys, means = (table.flatten(0, 2).index_select(0, touched) for table in (self.centroids, self.value_means))
        values_left = means.float().mul_(scale[:, None]).sub_(lost_mean).to(means.dtype)
        shape = (*positions.shape, -1)
        parts = [
            WeightedPart(self.centroids, self.value_means, None, whole, None),
            WeightedPart(keys.view(shape), values_left.view(shape), None, log_left, None),
        ]
        return parts, count

    def _take_away(self, positions: Tensor, values: Tensor, first: int) -> tuple[list[Tensor], int]:
        """What becomes of the clusters that lose positions of values as in `parts`, and how many of all keep a member.

        On the layer's device: those clusters [B * Hkv * T] int64, rows of the tables' B * Hkv * C, per kv head each
        once, ascending, then its last as pad; the logarithm of how many members are left [B, Hkv, T], -inf for none and
        pads; with which factor [B * Hkv * T] a mean value counts, and what [B * Hkv * T, D] comes off the product, so
        that the mean value of the rest is left; both 0 for none and pads.
        """
        (batch, heads, width), dim = positions.shape, values.shape[3]
        if positions.dtype != torch.int32 or positions.device.type != "cpu" or not positions.is_contiguous():
            raise ValueError(
                f"positions: got {positions.dtype} on {positions.device} with strides {positions.stride()}, allowed: "
                "int32 in CPU memory, contiguous"
            )
        tokens = self.assignment.shape[2]
        if not positions.shape[:2] == values.shape[:2] == self.sizes.shape[:2] or dim != self.centroids.shape[3]:
            raise ValueError(
                f"positions, values: got {list(positions.shape)}, {list(values.shape)}, allowed: [B, Hkv, T], "
                f"[B, Hkv, L, D] of B, Hkv, D = {list(self.centroids.shape[:2])}, {self.centroids.shape[3]}"
            )
        if not 0 <= first <= values.shape[2] - tokens:
            raise ValueError(f"first: got {first}, allowed: 0 to {values.shape[2] - tokens}, for {tokens} tokens")
        device, pads, rows = self.log_sizes.device, batch * heads * width, values.flatten(0, 1)
        # One buffer, one copy: an int64 takes two floats. Beside a GPU it comes from torch's pinned memory, which is
        # not handed out again before the copy is done.
        packed = torch.empty(pads * (4 + dim), pin_memory=device.type == "cuda")
        places = [packed.data_ptr() + 4 * at * pads for at in (0, 2, 3, 4)]
        count = _native.take_away(
            as_key_store(rows),
            self.assignment.data_ptr(),
            tokens,
            self.sizes.data_ptr(),
            self.sizes.shape[2],
            positions.data_ptr(),
            width,
            first,
            self.num_threads,
            *places,
        )
        there = packed.to(device, non_blocking=True).split((2 * pads, pads, pads, dim * pads))
        touched, log_left, scale, lost_mean = there
        tables = [touched.view(torch.int64), log_left.view(positions.shape), scale, lost_mean.view(pads, dim)]
        return tables, count

    def _chosen(self, query: Tensor) -> Tensor:
        """[B, Hkv, C] bool: the clusters of largest estimated mass, summed over the group's query heads."""
        batch, heads, _, dim = self.centroids.shape
        grouped = query.reshape(batch, heads, -1, dim).float() * dim**-0.5
        logits = grouped @ self.centroids.float().transpose(2, 3) + self.log_sizes[:, :, None]
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

    @staticmethod
    def expected_bytes(rows: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
        """What `add` makes of so many tokens in each of B * Hkv rows: bytes on the device, and in CPU memory."""
        clusters = rows * (_counts(tokens)[1] + 1)
        return clusters * (2 * head_dim * dtype.itemsize + 4), 4 * (clusters + rows * tokens)

    @property
    def nbytes(self) -> int:
        tables = (self.centroids, self.value_means, self.log_sizes, self.sizes, self.assignment)
        return sum(table.nbytes for table in tables)


def _counts(tokens: int) -> tuple[int, int]:
    """Segments, and clusters in all of them, of so many tokens."""
    segments = max(round(tokens / _TOKENS_PER_SEGMENT), 1)
    return segments, max(tokens // (TOKENS_PER_CLUSTER * segments), 1) * segments
