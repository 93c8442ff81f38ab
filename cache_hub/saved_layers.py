"""What a cache of retrieved tokens keeps of its layers in files, and how it takes it back."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .index import TokenIndex
from .index.persistence import load_index
from .index.tensor_file import take
from .lift import SoftmaxLift
from .staged import StagedCache
from .static_zone import StaticZone, sinks_and_window
from .tail import CentroidTail

if TYPE_CHECKING:
    from config import RetroInferConfig

    from .indexed_sequences import IndexedSequences


class SavedLayers(StagedCache):
    """The part of TokenIndexCache that saves and restores the prompt's state, for one sequence.

    A layer's file holds keys and values [1, Hkv, L, D] of the prompt, the second moment of its late queries, the
    sampler's draws and the tail's tables, where there are any. The static zone is made from the keys and values again.
    """

    sinks: int
    window: int
    estimation: str
    num_threads: int | None
    insert_batch: int
    _keys: list[Tensor]
    _values: list[Tensor]
    _key_copies: dict[int, Tensor]
    _zones: list[StaticZone]
    _groups: list[list[IndexedSequences]]
    _tails: list[CentroidTail]

    @abstractmethod
    def new_index(self) -> TokenIndex:
        """An empty index for the sequences of one prefill call and one layer."""

    @abstractmethod
    def indexed_range(self, length: int) -> range:
        """Positions of a prompt of `length` tokens that are indexed; empty where it is attended in full."""

    @abstractmethod
    def note_full(self, length: int) -> None:
        """Remarks that a prompt of `length` tokens is attended in full."""

    @abstractmethod
    def keep_index(
        self, layer_idx: int, start_bdx: int, count: int, index: TokenIndex, lift: SoftmaxLift | None, moment: Tensor
    ) -> None:
        """Takes the built index of `count` sequences from start_bdx on; see IndexedSequences."""

    def _searched_keys(self, layer_idx: int) -> Tensor:
        """The layer's keys [B, Hkv, L, D] as its indexes refer to them: the copy in CPU memory, where there is one."""
        return self._key_copies.get(layer_idx, self._keys[layer_idx])

    @classmethod
    def built_settings(cls, settings: RetroInferConfig) -> dict[str, Any]:
        """Sinks, window, whether a sample is drawn; subclasses add their index's."""
        return {
            "static_pattern_start": settings.static_pattern_start,
            "static_pattern_end": settings.static_pattern_end,
            "softmax_lift": settings.attention_aware_graph.estimation == "softmax_lift",
        }

    def layer_tensors(self, layer_idx: int) -> dict[str, Tensor]:
        """See KV_Cache.layer_tensors."""
        prompt = self.prompt_lengths[0]
        tensors = {"keys": self._keys[layer_idx][:, :, :prompt], "values": self._values[layer_idx][:, :, :prompt]}
        for group in self._groups[layer_idx]:
            tensors["query_moment"] = group.query_moment
            if group.lift is not None:
                tensors["minus_log_u"] = group.lift.minus_log_u
        return tensors | (self._tails[layer_idx].tables() if self._tails else {})

    def layer_index(self, layer_idx: int) -> TokenIndex | None:
        """See KV_Cache.layer_index."""
        return self._groups[layer_idx][0].index if self._groups[layer_idx] else None

    def restore_layer(self, layer_idx: int, tensors: dict[str, Tensor], index_path: Path | None) -> None:
        """See KV_Cache.restore_layer; layers in order. Keys and values stay in the file, but beside a GPU they are
        copied to pinned memory, which it can read, or to its own; then keys stay for what searches in CPU memory. What
        is mapped has no room behind it: generated tokens stay static, as with insert_batch 0."""
        self.insert_batch = 0
        length, device = self.prompt_lengths[0], self.devices[layer_idx]
        indexed, shape = self.indexed_range(length), (1, self.kv_head, length, self.head_dim)
        for name, prompt_store in (("keys", self._keys), ("values", self._values)):
            states = take(tensors, name, shape, self.dtype)
            prompt_store[layer_idx] = (
                prompt_store[layer_idx][:, :, :length].copy_(states) if device.type == "cuda" else states
            )
            if name == "keys" and layer_idx in self._key_copies:
                self._key_copies[layer_idx] = states
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if indexed:
            if index_path is None:
                raise ValueError(f"index: missing, allowed: one over {len(indexed)} tokens")
            between = self._searched_keys(layer_idx)[:, :, indexed.start : indexed.stop].flatten(0, 1)
            self._restore_index(layer_idx, between, tensors, index_path)
            keys, values = (sinks_and_window(states, self.sinks, self.window) for states in (keys, values))
        else:
            self.note_full(length)
        self._zones[layer_idx].put(slice(0, 1), keys, values)
        if "assignment" in tensors:
            tail = CentroidTail(1, self.kv_head, self.head_dim, self.dtype, device)
            tail.restore(tensors, len(indexed))
            self._tails.append(tail)
        if len(self._tails) not in (0, layer_idx + 1):
            raise ValueError("assignment: missing, allowed: clusters in all layers or in none")

    def _restore_index(self, layer_idx: int, keys: Tensor, tensors: dict[str, Tensor], path: Path) -> None:
        """Loads the index over keys [Hkv, N, D]."""
        rows, tokens, dim = keys.shape
        moment = take(tensors, "query_moment", (rows, dim, dim), torch.float32).to(self.devices[layer_idx])
        draws, empty = None, self.new_index()
        if self.estimation == "softmax_lift":
            draws = take(tensors, "minus_log_u", (rows, tokens), torch.float32)
        index = load_index(type(empty), path, keys, draws, self.num_threads, empty.all_options(), checked=True)
        lift = None
        if draws is not None:
            lift = SoftmaxLift(index, self.kv_head, seed=layer_idx)
            lift.restore(draws, keys)
        self.keep_index(layer_idx, 0, 1, index, lift, moment)
