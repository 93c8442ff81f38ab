"""The wave index strategy (RetroInfer, arXiv 2505.02922; cache_hub/retroinfer_cache.py there)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_hub import WeightedPart, weighted_decode_attention

from .cache import KV_Cache
from .cluster_cache import ClusterCache
from .clusters import ClusterCounts, cluster_keys
from .diagnosis import agreement_with_exact
from .memory import CPU, Need, RunShape
from .static_zone import StaticZone, check_static, sinks_and_window
from .stats import Agreement
from .wave_index import Selection, WaveIndex

if TYPE_CHECKING:
    from config import RetroInferConfig


class WaveIndexCache(KV_Cache):
    """Three zones: steady tokens exact, the best clusters exact, the next ones by their centroids; the rest is dropped.

    Steady: the first `static_pattern_start` tokens, the last `static_pattern_end` of the prompt and all generated since
    the last update. Between them lie the tokens that are clustered, whose keys and values are kept cluster by cluster
    in CPU memory (pinned beside a GPU; where the layer computes if `gpu_only`). When `update_tokens` have been
    generated, the tokens between the sinks and the last `static_pattern_end` become clusters of their own. A prompt of
    fewer tokens than the steady ones and `update_tokens` is attended in full for good, which `stats.notes` says.

    How many clusters there are follows from the length of each prompt, as RetroInfer's configuration is made for each
    prompt (`ClusterCounts.for_length`): the settings' n_centroids and n_segment are those of one context length, and
    are not read. The shares of them that are retrieved and estimated are the settings'.

    Beside a GPU that does not hold the members, a `ClusterCache` keeps those read last on it: room for cache_ratio of
    the clusters, or for three times the retrieved ones where that is 0, `pages_per_cluster` pages each. top_k: what
    stats.agreement takes as the exact answer; nothing else depends on it.
    """

    update_tokens = 1024

    def __init__(
        self,
        *,
        max_new_length: int,
        static_pattern_start: int = 4,
        static_pattern_end: int = 64,
        retrieval_budget: float = 0.018,
        estimation_budget: float = 0.232,
        cache_ratio: float = 0.0,
        pages_per_cluster: int = 2,
        gpu_only: bool = False,
        top_k: int = 100,
        **common: Any,
    ) -> None:
        super().__init__(max_new_length=max_new_length, **common)
        check_static(max_new_length, static_pattern_start, static_pattern_end)
        self.sinks, self.window, self.top_k = static_pattern_start, static_pattern_end, top_k
        self.retrieval_budget, self.estimation_budget = retrieval_budget, estimation_budget
        if not 0 <= cache_ratio <= 1 or pages_per_cluster < 1:
            raise ValueError(
                f"cache_ratio, pages_per_cluster: got {cache_ratio}, {pages_per_cluster}, allowed: 0 to 1, >= 1"
            )
        self.cache_ratio, self.pages_per_cluster, self.gpu_only = cache_ratio, pages_per_cluster, gpu_only
        grown = self.counts_for(self.update_tokens).centroids  # raises for a budget outside [0, 1]
        updates = max_new_length // self.update_tokens
        steady = self.sinks + self.window + self.update_tokens
        prompt = self.max_length - max_new_length
        rows = prompt + updates * self.update_tokens - self.sinks - self.window if prompt >= steady else 0
        sizes = (self.batch_size, self.kv_head)
        self._zones = [
            StaticZone(*sizes, min(steady, self.max_length), self.head_dim, self.dtype, device)
            for device in self.devices
        ]
        self._indexes = [
            WaveIndex(*sizes, rows, self.head_dim, self.dtype, device, updates * grown, gpu_only)
            for device in self.devices
        ]
        self._caches: list[ClusterCache | None] = [None] * self.layer_num
        self._pending: tuple[Tensor, Tensor] | None = None

    @classmethod
    def options(cls, settings: RetroInferConfig) -> dict[str, Any]:
        return {
            "static_pattern_start": settings.static_pattern_start,
            "static_pattern_end": settings.static_pattern_end,
            "retrieval_budget": settings.retrieval_budget,
            "estimation_budget": settings.estimation_budget,
            "cache_ratio": settings.cache_ratio,
            "pages_per_cluster": settings.pages_per_cluster,
            "gpu_only": settings.gpu_only,
            "top_k": settings.attention_aware_graph.top_k,
        }

    @classmethod
    def layer_needs(cls, settings: RetroInferConfig, shape: RunShape, device: torch.device) -> list[Need]:
        o, longest, dim = cls.options(settings), shape.longest, shape.head_dim
        ends, updates = o["static_pattern_start"] + o["static_pattern_end"], shape.max_new_length // cls.update_tokens
        steady, rows = ends + cls.update_tokens, shape.batch * shape.kv_heads
        static = min(steady, longest + shape.max_new_length)
        zone = Need(device, "static tokens", 2 * shape.batch * static * shape.row_bytes)
        if longest < steady:
            return [zone]
        budgets = o["retrieval_budget"], o["estimation_budget"]
        counts = ClusterCounts.for_length(longest, *budgets)
        spare = updates * ClusterCounts.for_length(cls.update_tokens, *budgets).centroids
        place = device if o["gpu_only"] else CPU
        pinned = device.type == "cuda" and not o["gpu_only"]
        members = updates * cls.update_tokens - ends
        # While a layer is laid out: its clusters in float32, the order of its members, and a copy in this order.
        together = shape.prefill_bsz * shape.kv_heads
        built = counts.centroids * 8 * dim + (longest - ends) * (4 + 8 + dim * shape.dtype.itemsize)
        needs = [
            zone,
            Need(place, "keys and values", shape.store_bytes(members, place, pinned)),
            Need(device, "index", rows * (counts.centroids + spare) * (2 * dim * shape.dtype.itemsize + 8)),
            Need(device, "a layer's build", together * built, "build"),
        ]
        if pinned:
            pages = _cache_pages(counts.centroids, counts.retrieved, o["cache_ratio"], o["pages_per_cluster"])
            sizes = longest + members, counts.centroids + spare, pages, dim * shape.dtype.itemsize
            needs.append(Need(device, "cluster cache", ClusterCache.expected_bytes(rows, *sizes), "after"))
        return needs

    def counts_for(self, length: int) -> ClusterCounts:
        """Clusters of a prompt of `length` tokens, or of `length` generated ones."""
        return ClusterCounts.for_length(length, self.retrieval_budget, self.estimation_budget)

    def clustered_range(self, length: int) -> range:
        """Positions of a prompt of `length` tokens that are clustered; empty where it is attended in full."""
        middle = range(self.sinks, length - self.window)
        return middle if len(middle) >= self.update_tokens else range(0)

    def store_prompt(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, start_bdx: int) -> None:
        length, sequences = k.shape[1], slice(start_bdx, start_bdx + len(k))
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        middle = self.clustered_range(length)
        if not middle:
            self.stats.note(
                f"{length} tokens are attended in full: {self.sinks} + {self.window} are steady and fewer than "
                f"{self.update_tokens} others are too few to cluster"
            )
            self._zones[layer_idx].put(sequences, keys, values)
            return
        clusters = self.counts_for(length).centroids
        if clusters > len(middle):
            raise ValueError(
                f"static_pattern_start, static_pattern_end: got {self.sinks}, {self.window}, which leave {len(middle)} "
                f"of {length} tokens to {clusters} clusters, allowed: no fewer tokens than clusters"
            )
        self._keep_ends(layer_idx, sequences, keys, values)
        self._pending = keys[:, :, middle.start : middle.stop], values[:, :, middle.start : middle.stop]

    def sync(self, layer_idx: int, start_bdx: int) -> None:
        """Clusters the tokens stored last and lays them out."""
        if self._pending is None:
            return
        (keys, values), self._pending = self._pending, None
        sequences, counts = slice(start_bdx, start_bdx + len(keys)), self.counts_for(self.prompt_lengths[start_bdx])
        self._cluster(layer_idx, sequences, keys, values, counts, "build")

    def prepare_cache(self) -> None:
        """Makes the cluster caches, where there is a GPU that does not hold the members."""
        for layer_idx, (index, device) in enumerate(zip(self._indexes, self.devices, strict=True)):
            if device.type == "cuda" and not self.gpu_only and any(index.stored):
                self._caches[layer_idx] = ClusterCache(index, self.cache_pages(index))

    def cache_pages(self, index: WaveIndex) -> int:
        """Pages of a kv head in a layer's cluster cache."""
        centroids, retrieved = (max(getattr(c, name) for c in index.counts) for name in ("centroids", "retrieved"))
        return _cache_pages(centroids, retrieved, self.cache_ratio, self.pages_per_cluster)

    def decode_update_kv_cache(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> None:
        zone = self._zones[layer_idx]
        zone.append(key_states, value_states)
        self.generated[layer_idx] += 1
        if self.generated[layer_idx] % self.update_tokens:
            return
        between = slice(self.sinks, self.sinks + self.update_tokens)
        for b, length in enumerate(self.prompt_lengths):
            if self.clustered_range(length):
                one, counts = slice(b, b + 1), self.counts_for(self.update_tokens)
                keys, values = (states[one, :, : zone.counts[b]] for states in (zone.keys, zone.values))
                self._cluster(layer_idx, one, keys[:, :, between], values[:, :, between], counts, "update")
                self._keep_ends(layer_idx, one, keys, values)

    def compute(self, query_states: Tensor, layer_idx: int) -> Tensor:
        zone, index = self._zones[layer_idx], self._indexes[layer_idx]
        parts, cache = [zone.part()], self._caches[layer_idx]
        if any(index.stored):
            with self.stats.timed("search"):
                selection = index.select(query_states)
                members, moved = self._members(index, cache, selection)
            if self.stats.agreement is not None:
                with self.stats.timed("diagnosis"):
                    self._compare(query_states, index.rows_of(selection.retrieved), layer_idx, self.stats.agreement)
            parts += [*members, index.estimated_part(selection.estimated)]
            self._count_clusters(index, selection, moved)
        self.stats.attended += self.kv_head * sum(zone.counts)
        context = sum(self.context_lengths(layer_idx))
        self.stats.attended_of += context * self.kv_head
        self.stats.scored_of += context * self.num_heads
        with self.stats.timed("attention"):
            out = weighted_decode_attention(query_states, parts)
        if cache is not None:
            with self.stats.timed("admit"):
                cache.admit()
        return out

    def _members(
        self, index: WaveIndex, cache: ClusterCache | None, selection: Selection
    ) -> tuple[list[WeightedPart], int]:
        """The members of the retrieved clusters to attend to, and how many of them are read from CPU memory."""
        if cache is not None:
            return cache.parts(selection.retrieved)
        rows = index.rows_of(selection.retrieved, selection.most_members)
        return [index.retrieved_part(rows)], 0 if self.gpu_only else selection.members

    def _keep_ends(self, layer_idx: int, sequences: slice, keys: Tensor, values: Tensor) -> None:
        """Leaves the sequences no more of keys and values [b, Hkv, T, D] in their zone than sinks and window."""
        ends = (sinks_and_window(states, self.sinks, self.window) for states in (keys, values))
        self._zones[layer_idx].put(sequences, *ends)

    def _cluster(
        self, layer_idx: int, sequences: slice, keys: Tensor, values: Tensor, counts: ClusterCounts, stage: str
    ) -> None:
        """Adds keys and values [b, Hkv, N, D] of the sequences to the layer's index; `stage` is charged for it."""
        with self.stats.timed(stage):
            clusters = cluster_keys(keys.flatten(0, 1), values.flatten(0, 1), counts.segments, counts.centroids)
        with self.stats.timed("store"):
            self._indexes[layer_idx].add(sequences, keys, values, clusters, counts)
            cache = self._caches[layer_idx]
            if cache is not None:
                cache.refresh()

    def _count_clusters(self, index: WaveIndex, selection: Selection, moved: int) -> None:
        self.stats.attended += selection.members
        self.stats.estimated += selection.estimates
        self._count_centroids(sum(counts.centroids for counts in index.counts))
        self.stats.bytes_moved += 2 * moved * self.head_dim * self.dtype.itemsize

    def _compare(self, query_states: Tensor, rows: Tensor, layer_idx: int, agreement: Agreement) -> None:
        """Adds recall and attention mass of one step, by an exact scan of every clustered sequence's keys."""
        zone, index = self._zones[layer_idx], self._indexes[layer_idx]
        for b, stored in enumerate(index.stored):
            if stored:
                queries = query_states[b].reshape(self.kv_head, self.group_size, self.head_dim).cpu()
                static_keys = zone.keys[b, :, : zone.counts[b]].cpu()
                keys, found = index.keys[b, :, :stored].cpu(), rows[b, :, None].cpu()
                tables = agreement_with_exact(queries, keys, static_keys, found, self.top_k)
                scored = tables[0].new_full(tables[0].shape, index.counts[b].centroids)
                agreement.add(layer_idx, *(table.view(1, self.num_heads) for table in (*tables, scored)))

    @property
    def index_bytes(self) -> int:
        caches = sum(cache.nbytes for cache in self._caches if cache is not None)
        return sum(index.nbytes for index in self._indexes) + caches


def _cache_pages(centroids: int, retrieved: int, cache_ratio: float, pages_per_cluster: int) -> int:
    """Pages of a kv head in a cluster cache, beside so many clusters, of which so many are retrieved."""
    clusters = cache_ratio * centroids if cache_ratio else 3 * retrieved
    return max(round(clusters * pages_per_cluster), 1)
