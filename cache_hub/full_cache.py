"""Full attention: every token, in the memory of the device that computes the layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_hub import WeightedPart, append_token, decode_splits

from .index.tensor_file import take
from .memory import Need, RunShape
from .staged import StagedCache
from .stats import CacheStats

if TYPE_CHECKING:
    from attn_hub.kernels.weighted_decode import TritonSplits
    from attn_hub.reference import ReferenceSplits
    from config import RetroInferConfig


class FullCache(StagedCache):
    """Keeps [B, Hkv, max_length, D] per layer on the layer's device and attends to all of it."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        shape = (self.batch_size, self.kv_head, self.max_length, self.head_dim)
        self._keys = [torch.empty(shape, dtype=self.dtype, device=device) for device in self.devices]
        self._values = [torch.empty(shape, dtype=self.dtype, device=device) for device in self.devices]
        self._lengths = [
            torch.zeros(self.batch_size, self.kv_head, dtype=torch.int32, device=device) for device in self.devices
        ]

    @classmethod
    def layer_needs(cls, settings: RetroInferConfig, shape: RunShape, device: torch.device) -> list[Need]:
        return [Need(device, "keys and values", shape.store_bytes(shape.max_new_length, device))]

    def store_prompt(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, start_bdx: int) -> None:
        rows, length = slice(start_bdx, start_bdx + len(k)), k.shape[1]
        self._keys[layer_idx][rows, :, :length] = k.transpose(1, 2)
        self._values[layer_idx][rows, :, :length] = v.transpose(1, 2)
        self._lengths[layer_idx][rows] = length

    @classmethod
    def built_settings(cls, settings: RetroInferConfig) -> dict[str, Any]:
        return {}

    def layer_tensors(self, layer_idx: int) -> dict[str, Tensor]:
        prompt = slice(self.prompt_lengths[0])
        return {"keys": self._keys[layer_idx][:, :, prompt], "values": self._values[layer_idx][:, :, prompt]}

    def restore_layer(self, layer_idx: int, tensors: dict[str, Tensor], index_path: Path | None) -> None:
        """Copies keys and values: every step reads them all, with those of new tokens behind them."""
        length = self.prompt_lengths[0]
        for name, store in (("keys", self._keys), ("values", self._values)):
            states = take(tensors, name, (1, self.kv_head, length, self.head_dim), self.dtype)
            store[layer_idx][:, :, :length] = states
        self._lengths[layer_idx][:] = length

    def rewind(self) -> None:
        for lengths, generated in zip(self._lengths, self.generated, strict=True):
            lengths -= generated
        self.generated = [0] * self.layer_num
        self.stats = CacheStats(agreement=self.stats.agreement)

    def write_token(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> None:
        stores = self._keys[layer_idx], self._values[layer_idx], self._lengths[layer_idx]
        append_token(*stores, key_states, value_states)

    def begin(self, query_states: Tensor, layer_idx: int) -> ReferenceSplits | TritonSplits:
        part = WeightedPart(self._keys[layer_idx], self._values[layer_idx], None, None, self._lengths[layer_idx])
        begun = decode_splits(query_states, [part])
        begun.attend(1)
        return begun

    def note_step(self, layer_idx: int) -> None:
        tokens = self.kv_head * sum(self.context_lengths(layer_idx))
        self.stats.attended += tokens
        self.stats.attended_of += tokens

    def captured(self, layer_idx: int) -> tuple[int, ...]:
        return (self._keys[layer_idx].data_ptr(),)
