"""Where a cache of retrieved tokens keeps them, and how generated ones come into its index."""

from __future__ import annotations

from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from .index.metric import query_moment
from .indexed_sequences import LatestQueries
from .layer_search import LayerSearch
from .pinned import copying, pinned_empty
from .saved_layers import SavedLayers
from .static_zone import StaticZone


class GrowingLayers(SavedLayers):
    """The part of TokenIndexCache that holds keys, values and static tokens of every layer, and moves generated tokens
    from the static zone into store, index and tail, a batch of `insert_batch` at a time.
    """

    searches_on_host: ClassVar[bool] = True
    gpu_only: bool
    min_indexed: int
    _searches: dict[int, LayerSearch]
    _latest: list[LatestQueries]

    @classmethod
    def copies_keys(cls, gpu_only: bool, device: torch.device) -> bool:
        """Whether a layer there has its keys in CPU memory too, for what searches there."""
        return cls.searches_on_host and gpu_only and device.type == "cuda"

    def _allocate(self) -> None:
        """Stores for prompt and indexed tokens in CPU memory, pinned beside a GPU, or with `gpu_only` where the layers
        compute, as the zones are.

        A layer's keys and values [B, Hkv, L, D] are views of one store [B, Hkv, L, 2, D]: those of a token lie side by
        side, one piece of memory for what gathers them. Copies of keys are [B, Hkv, L, D].
        """
        prompt, batch = self.max_length - self.max_new_length, self.insert_batch
        ends = self.sinks + self.window + self.min_indexed
        static, grown = static_and_grown(prompt, self.max_new_length, ends, self.window, batch)
        rows = (self.batch_size, self.kv_head)
        self._keys, self._values, self._zones, self._key_copies = [], [], [], {}
        for layer_idx, device in enumerate(self.devices):
            shape = (*rows, prompt + grown, 2, self.head_dim)
            if self.gpu_only or device.type == "cpu":
                store = torch.empty(shape, dtype=self.dtype, device=device)
            else:
                store = pinned_empty(shape, self.dtype)
            if self.copies_keys(self.gpu_only, device):
                self._key_copies[layer_idx] = pinned_empty((*shape[:3], self.head_dim), self.dtype)
            self._keys.append(store[..., 0, :])
            self._values.append(store[..., 1, :])
            self._zones.append(StaticZone(*rows, static, self.head_dim, self.dtype, device))
        self._due: dict[int, Tensor] = {}
        self._latest = self._latest_queries()

    def _latest_queries(self) -> list[LatestQueries]:
        batch, layers = self.insert_batch, range(self.layer_num)
        return [LatestQueries(batch, layer * batch // self.layer_num) for layer in layers]

    def _put(
        self, layer_idx: int, sequences: slice, tokens: slice, keys: Tensor, values: Tensor
    ) -> torch.cuda.Event | None:
        """Stores keys and values [b, Hkv, T, D] of the sequences' `tokens`; what goes from a GPU to CPU memory is there
        once the event has happened."""
        own_keys, own_values = (stores[layer_idx][sequences, :, tokens] for stores in (self._keys, self._values))
        there = own_keys.device == keys.device
        if there:
            own_keys.copy_(keys)
            own_values.copy_(values)
            if layer_idx not in self._key_copies:
                return None
            host = self._key_copies[layer_idx][sequences, :, tokens]
        else:
            host = own_keys.as_strided((*keys.shape[:3], 2, keys.shape[3]), (*own_keys.stride()[:3], keys.shape[3], 1))
        with copying(keys.device, keys, values) as done:
            for b, head in product(range(len(keys)), range(self.kv_head)):
                # Contiguous on both sides: torch takes other layouts through pageable memory.
                rows = keys[b, head].contiguous() if there else torch.stack((keys[b, head], values[b, head]), 1)
                host[b, head].copy_(rows, non_blocking=True)
        return done

    @property
    def _inserted(self) -> int:
        """Generated tokens of a sequence that the furthest layer has in its index."""
        return max(latest.batches for latest in self._latest) * self.insert_batch

    def make_room(self, layer_idx: int) -> None:
        if self._zones[layer_idx].make_room():
            self.version += 1

    def write_token(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> None:
        self._zones[layer_idx].write(key_states, value_states)

    def count_token(self, layer_idx: int) -> None:
        super().count_token(layer_idx)
        self._zones[layer_idx].count()

    def keep_query(self, queries: Tensor, layer_idx: int) -> None:
        """Takes the step's queries [B, H, D], of which a batch that enters the index is linked by."""
        if self.insert_batch and self.generated[layer_idx] <= self.max_new_length:
            due = self._latest[layer_idx].put(self.generated[layer_idx], queries)
            if due is not None:
                self._due[layer_idx] = due

    def turn(self, layer_idx: int) -> None:
        """When the layer's turn has come, the oldest batch goes from the static zone into store, index and tail."""
        queries = self._due.pop(layer_idx, None)
        if queries is None:
            return
        batch, step = self.insert_batch, self.generated[layer_idx]
        self.version += 1
        with self.stats.timed("insert"):
            for group in self._groups[layer_idx]:
                keys, values = self._zones[layer_idx].take(group.sequences, self.sinks, batch)
                put = self._put(layer_idx, group.sequences, slice(group.stop, group.stop + batch), keys, values)
                if put is not None:
                    put.synchronize()
                asked_from = self.prompt_lengths[group.start] + step - batch
                group.insert(self._searched_keys(layer_idx), batch, queries, asked_from)
                if self._tails:
                    moment = query_moment(group.by_row(queries, self.kv_head))
                    self._tails[layer_idx].add(group.sequences, keys, values, moment)
            self.note_grown(layer_idx)

    def note_grown(self, layer_idx: int) -> None:
        """Tells what searches the layer that store, index and tail have taken in a batch."""
        self._searches[layer_idx].refresh()


def inserted_at_once(insert_batch: int, max_new_length: int) -> int:
    """Generated tokens that leave the static ones at a time; 0 where there never are as many."""
    return insert_batch if insert_batch <= max_new_length else 0


def static_and_grown(prompt: int, new: int, ends: int, window: int, batch: int) -> tuple[int, int]:
    """Tokens to make room for in a static zone, of which `ends` are the prompt's, and in a store behind the prompt."""
    # A layer whose turn comes last holds nearly two batches.
    static = min(ends, prompt) + (min(2 * batch, new) if batch else new)
    return static, max(new // batch * batch - window, 0) if batch else 0
