"""The tokens of one layer that every query attends to exactly, where the layer computes."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_hub import WeightedPart, append_token


class StaticZone:
    """Keys and values [B, Hkv, capacity, D] of tokens attended exactly, in any order.

    counts: tokens that each sequence holds. The capacity grows by itself when `append` finds it used up.
    """

    def __init__(
        self, batch_size: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch_size, kv_heads, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.counts = [0] * batch_size
        self._lengths = torch.zeros(batch_size, kv_heads, dtype=torch.int32, device=device)

    def put(self, sequences: slice, keys: Tensor, values: Tensor) -> None:
        """Replaces all that the sequences hold by keys and values [b, Hkv, T, D]."""
        count = keys.shape[2]
        self.keys[sequences, :, :count] = keys
        self.values[sequences, :, :count] = values
        self.counts[sequences] = [count] * len(keys)
        self._lengths[sequences] = count

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Adds one token [B, 1, Hkv, D] to every sequence."""
        self.make_room()
        self.write(key_states, value_states)
        self.count()

    def make_room(self) -> None:
        """Grows where a sequence has used up the capacity."""
        capacity = self.keys.shape[2]
        if max(self.counts) == capacity:
            more = (*self.keys.shape[:2], max(capacity // 2, 64), self.keys.shape[3])
            self.keys = torch.cat((self.keys, self.keys.new_empty(more)), 2)
            self.values = torch.cat((self.values, self.values.new_empty(more)), 2)

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """The device's part of `append`, where there is room."""
        append_token(self.keys, self.values, self._lengths, key_states, value_states)

    def count(self) -> None:
        """The host's part of `append`."""
        self.counts = [count + 1 for count in self.counts]

    def drop_last(self, tokens: int) -> None:
        """Forgets the tokens of every sequence that came last."""
        self.counts = [count - tokens for count in self.counts]
        self._lengths -= tokens

    def take(self, sequences: slice, at: int, count: int) -> tuple[Tensor, Tensor]:
        """Takes the tokens at..at + count - 1 out, of sequences that hold equally many; those behind them move up.
        Returns copies of their keys and values [b, Hkv, count, D]."""
        end = self.counts[sequences][0]
        taken = []
        for table in (self.keys, self.values):
            taken.append(table[sequences, :, at : at + count].clone())
            table[sequences, :, at : end - count] = table[sequences, :, at + count : end].clone()
        self.counts[sequences] = [end - count] * len(self.counts[sequences])
        self._lengths[sequences] -= count
        return taken[0], taken[1]

    def part(self) -> WeightedPart:
        """All tokens held, each counted once."""
        return WeightedPart(self.keys, self.values, None, None, self._lengths)


def sinks_and_window(states: Tensor, sinks: int, window: int) -> Tensor:
    """A copy of the first `sinks` and the last `window` tokens of [b, Hkv, T, D]."""
    return torch.cat((states[:, :, :sinks], states[:, :, -window:]), 2)


def check_static(max_new_length: int, static_pattern_start: int, static_pattern_end: int) -> None:
    """Raises ValueError for sizes that a cache with sinks and a window cannot work with."""
    if max_new_length < 1:
        raise ValueError(f"max_new_length: got {max_new_length}, allowed: >= 1")
    if static_pattern_start < 0 or static_pattern_end < 1:
        raise ValueError(
            f"static_pattern_start, static_pattern_end: got {static_pattern_start}, {static_pattern_end}, allowed: "
            ">= 0, >= 1"
        )
