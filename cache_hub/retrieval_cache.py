"""Static tokens attended exactly, all others retrieved through a token index (RetrievalAttention, section 3.2)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_hub import WeightedPart, weighted_decode_attention

from .cache import KV_Cache
from .index import TokenIndex
from .index.knn import exact_topk
from .stats import Agreement

if TYPE_CHECKING:
    from config import RetroInferConfig


@dataclass
class _Indexed:
    """The index of the sequences of one prefill call; their rows are sequence-major: [count * Hkv]."""

    start: int
    count: int
    index: TokenIndex


class TokenIndexCache(KV_Cache):
    """Keys and values of the prompt in CPU memory (pinned beside a GPU), static tokens where the layer computes.

    Static: the first `static_pattern_start` tokens, the last `static_pattern_end` of the prompt and all generated ones.
    Between them lie the indexed tokens: per query head the index finds top_k, and the g query heads of a kv head attend
    to the union of what they found. A prompt with at most `min_indexed` tokens between is attended in full, which
    `stats.notes` says. `core`: CPU threads of the index beside a GPU.
    """

    def __init__(
        self,
        *,
        max_new_length: int,
        static_pattern_start: int = 4,
        static_pattern_end: int = 64,
        core: int | None = None,
        top_k: int = 100,
        min_indexed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(max_new_length=max_new_length, **common)
        if max_new_length < 1:
            raise ValueError(f"max_new_length: got {max_new_length}, allowed: >= 1")
        if top_k < 1:
            raise ValueError(f"top_k: got {top_k}, allowed: >= 1")
        if static_pattern_start < 0 or static_pattern_end < 1:
            raise ValueError(
                f"static_pattern_start, static_pattern_end: got {static_pattern_start}, {static_pattern_end}, allowed: "
                ">= 0, >= 1"
            )
        self.sinks, self.window, self.top_k, self.min_indexed = (
            static_pattern_start,
            static_pattern_end,
            top_k,
            min_indexed,
        )
        # Without a GPU the main thread computes too: torch's own thread count is the right one then.
        self.num_threads = core if self.devices[0].type == "cuda" else None
        self._groups: list[list[_Indexed]] = [[] for _ in self.devices]
        self._pending: Tensor | None = None
        self._allocate()

    @classmethod
    def options(cls, settings: RetroInferConfig) -> dict[str, Any]:
        return {
            "static_pattern_start": settings.static_pattern_start,
            "static_pattern_end": settings.static_pattern_end,
            "core": settings.core,
            "top_k": settings.attention_aware_graph.top_k,
        }

    @abstractmethod
    def new_index(self) -> TokenIndex:
        """An empty index for the sequences of one prefill call and one layer."""

    def _allocate(self) -> None:
        prompt = self.max_length - self.max_new_length
        static = min(self.sinks + self.window + self.min_indexed, prompt) + self.max_new_length
        rows = (self.batch_size, self.kv_head)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._static_keys: list[Tensor] = []
        self._static_values: list[Tensor] = []
        self._static_lengths: list[Tensor] = []
        for device in self.devices:
            pinned = device.type == "cuda"
            for prompt_store in (self._keys, self._values):
                store = torch.empty(*rows, prompt, self.head_dim, dtype=self.dtype, pin_memory=pinned)
                prompt_store.append(store)
            for static_store in (self._static_keys, self._static_values):
                static_store.append(torch.empty(*rows, static, self.head_dim, dtype=self.dtype, device=device))
            self._static_lengths.append(torch.zeros(rows, dtype=torch.int32, device=device))

    def indexed_range(self, length: int) -> range:
        """Positions of a prompt of `length` tokens that are indexed; empty where it is attended in full."""
        middle = range(self.sinks, length - self.window)
        return middle if len(middle) > self.min_indexed else range(0)

    def store_prompt(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, start_bdx: int) -> None:
        rows, length = slice(start_bdx, start_bdx + len(k)), k.shape[1]
        indexed = self.indexed_range(length)
        with self.stats.timed("store"):
            for states, store, static in (
                (k, self._keys[layer_idx], self._static_keys[layer_idx]),
                (v, self._values[layer_idx], self._static_values[layer_idx]),
            ):
                states = states.transpose(1, 2)
                store[rows, :, :length] = states
                if indexed:
                    static[rows, :, : self.sinks] = states[:, :, : self.sinks]
                    static[rows, :, self.sinks : self.sinks + self.window] = states[:, :, -self.window :]
                else:
                    static[rows, :, :length] = states
            self._static_lengths[layer_idx][rows] = length - len(indexed)
        if indexed:
            self._pending = q
        else:
            self.stats.note(
                f"{length} tokens are attended in full: {self.sinks} + {self.window} are static and at most "
                f"{self.min_indexed} others are too few to index"
            )

    def sync(self, layer_idx: int, start_bdx: int) -> None:
        """Builds the layer's index over the sequences stored last; nothing is kept of their queries."""
        if self._pending is None:
            return
        q, self._pending = self._pending, None
        count, length = q.shape[:2]
        indexed = self.indexed_range(length)
        rows = count * self.kv_head
        # [count, L, Hkv * g, D] -> [count * Hkv, g, L, D]
        queries = q.unflatten(2, (self.kv_head, self.group_size)).permute(0, 2, 3, 1, 4)
        keys = self._keys[layer_idx][start_bdx : start_bdx + count, :, indexed.start : indexed.stop].flatten(0, 1)
        positions = torch.arange(length, device=q.device) - indexed.start
        index = self.new_index()
        with self.stats.timed("build"):
            index.build(keys, queries.reshape(rows, self.group_size, length, self.head_dim), positions)
        for stage, seconds in index.build_seconds.items():
            self.stats.seconds[stage] += seconds
        self._groups[layer_idx].append(_Indexed(start_bdx, count, index))

    def decode_update_kv_cache(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> None:
        step = self.generated[layer_idx]
        for b, length in enumerate(self.prompt_lengths):
            at = length - len(self.indexed_range(length)) + step
            self._static_keys[layer_idx][b, :, at] = key_states[b, 0]
            self._static_values[layer_idx][b, :, at] = value_states[b, 0]
        self._static_lengths[layer_idx] += 1
        self.generated[layer_idx] += 1

    def compute(self, query_states: Tensor, layer_idx: int) -> Tensor:
        parts = [
            WeightedPart(
                self._static_keys[layer_idx],
                self._static_values[layer_idx],
                None,
                None,
                self._static_lengths[layer_idx],
            )
        ]
        if self._groups[layer_idx]:
            with self.stats.timed("search"):
                found, ids = self._retrieve(query_states, layer_idx)
            if self.stats.agreement is not None:
                with self.stats.timed("diagnosis"):
                    self._compare(query_states, found, layer_idx, self.stats.agreement)
            parts.append(WeightedPart(self._keys[layer_idx], self._values[layer_idx], ids, None, None))
        self._count_tokens(layer_idx)
        with self.stats.timed("attention"):
            return weighted_decode_attention(query_states, parts)

    def _retrieve(self, query_states: Tensor, layer_idx: int) -> tuple[list[Tensor], Tensor]:
        """What every group's search found, index ids [R, g, top_k], and the positions to attend to: the union over
        each kv head's group, [B, Hkv, g * top_k] int32 on the query's device, -1 pads."""
        # [B, 1, Hkv * g, D] -> [B * Hkv, g, D]
        queries = query_states.reshape(-1, self.group_size, self.head_dim)
        shape = (self.batch_size, self.kv_head, self.group_size * self.top_k)
        ids = torch.full(shape, -1, dtype=torch.int32)
        found = []
        for group in self._groups[layer_idx]:
            rows = slice(group.start * self.kv_head, (group.start + group.count) * self.kv_head)
            result = group.index.search(queries[rows], self.top_k)
            united = unite(result.ids.cpu())
            ids[group.start : group.start + group.count] = torch.where(united >= 0, united + self.sinks, -1).view(
                -1, *shape[1:]
            )
            found.append(result.ids)
            self.stats.scored += int(result.keys_scored.sum())
        attended = int((ids >= 0).sum())
        self.stats.attended += attended
        self.stats.bytes_moved += 2 * attended * self.head_dim * self.dtype.itemsize
        return found, ids.to(query_states.device, non_blocking=True)

    def _count_tokens(self, layer_idx: int) -> None:
        step = self.generated[layer_idx]
        static = sum(length - len(self.indexed_range(length)) + step for length in self.prompt_lengths)
        context = sum(self.context_lengths(layer_idx))
        self.stats.attended += static * self.kv_head
        self.stats.attended_of += context * self.kv_head
        self.stats.scored_of += context * self.num_heads

    def _compare(self, query_states: Tensor, found: list[Tensor], layer_idx: int, agreement: Agreement) -> None:
        """Adds recall and attention mass of one step, by an exact scan of every group's keys."""
        for group, found_ids in zip(self._groups[layer_idx], found, strict=True):
            sequences = slice(group.start, group.start + group.count)
            length = self.prompt_lengths[group.start]
            indexed = self.indexed_range(length)
            static_count = length - len(indexed) + self.generated[layer_idx]
            queries = query_states[sequences].reshape(-1, self.group_size, self.head_dim).cpu().float()
            keys = self._keys[layer_idx][sequences, :, indexed.start : indexed.stop].flatten(0, 1)
            static = self._static_keys[layer_idx][sequences, :, :static_count].flatten(0, 1).cpu()
            ids = found_ids.cpu()
            exact = exact_topk(keys, queries, min(self.top_k, len(indexed)))[1]
            recall = (exact[..., :, None] == ids[..., None, :]).any(-1).float().mean(-1)
            logits = queries @ torch.cat((keys, static), 1).float().transpose(1, 2) / self.head_dim**0.5
            weights = logits.softmax(-1)
            masses = [_mass(weights, unite(retrieved), len(indexed)) for retrieved in (ids, exact)]
            per_sequence = (group.count, self.num_heads)
            agreement.add(layer_idx, recall.view(per_sequence), *(mass.view(per_sequence) for mass in masses))

    @property
    def kv_bytes(self) -> int:
        tokens = sum(self.context_lengths(self.layer_num - 1))
        return 2 * self.layer_num * tokens * self.kv_head * self.head_dim * self.dtype.itemsize

    @property
    def index_bytes(self) -> int:
        return sum(group.index.nbytes for groups in self._groups for group in groups)


def unite(ids: Tensor) -> Tensor:
    """Union over the group of ids [R, g, k] -> [R, g * k] ascending, repeated ids replaced by -1."""
    flat = ids.flatten(1).sort(dim=1).values
    flat[:, 1:].masked_fill_(flat[:, 1:] == flat[:, :-1], -1)
    return flat


def _mass(weights: Tensor, united: Tensor, indexed: int) -> Tensor:
    """Softmax mass [R, g] of the rows `united` [R, T] (-1 pads) and of all from `indexed` on; weights [R, g, n]."""
    retrieved = weights.gather(2, united.clamp(min=0).long()[:, None].expand(-1, weights.shape[1], -1))
    return weights[..., indexed:].sum(-1) + (retrieved * (united >= 0)[:, None]).sum(-1)
