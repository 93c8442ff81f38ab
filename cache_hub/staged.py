"""A decode step of a layer in stages: device work that CUDA graphs can hold, with one stop at the host between."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import KV_Cache

if TYPE_CHECKING:
    from attn_hub.kernels.weighted_decode import TritonSplits
    from attn_hub.reference import ReferenceSplits


class StagedCache(KV_Cache):
    """For every layer of a step, in this order: write_token on the device, count_token on the host; where the layer
    `needs_host`, post_query on the device and `retrieve` on the host; beside that `begin`, then `end` on the device;
    and once `end` is on its way, `note_step` and `turn` on the host. Before all of it, where the layer `foresees`,
    post_foreseen on the device.

    What the device does reads nothing from the host but what lies in pinned memory, always at the same place: it can be
    captured once and replayed, as long as `captured` stays as it was; `version` changes whenever that may have changed.
    decode_update_kv_cache and compute are these stages one after another.
    """

    version = 0
    graphs: object | None = None  # of whoever replays the steps; they go with the cache

    @abstractmethod
    def write_token(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> None:
        """Takes one token's states [B, 1, Hkv, D] of every sequence, for which `make_room` was called. Device work."""

    def make_room(self, layer_idx: int) -> None:
        """Sees to it that the layer has room for one more token."""

    def count_token(self, layer_idx: int) -> None:
        """Takes note of the token written."""
        self.generated[layer_idx] += 1

    def needs_host(self, layer_idx: int) -> bool:
        """Whether the attention depends on what `retrieve` finds."""
        return False

    def foresees(self, layer_idx: int) -> bool:
        """Whether the layer's `retrieve` can begin with what the query will be about."""
        return False

    def post_foreseen(self, query_states: Tensor, layer_idx: int) -> None:
        """Sends what the query will be about [B, 1, H, D] to the host. Device work."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to ask the host")

    def expect_query(self, layer_idx: int) -> None:
        """Lets other threads begin with `retrieve` of a layer, of which post_foreseen is on its way. On the host."""

    def post_query(self, query_states: Tensor, layer_idx: int) -> None:
        """Sends the query [B, 1, H, D] to the host. Device work."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to ask the host")

    @abstractmethod
    def begin(self, query_states: Tensor, layer_idx: int) -> ReferenceSplits | TritonSplits:
        """Attention of query_states [B, 1, H, D] to all that does not depend on `retrieve`. Device work."""

    def waits_for_query(self, layer_idx: int) -> bool:
        """Whether `retrieve` sees by itself when the query has come."""
        return False

    def retrieve(self, layer_idx: int, arrived: torch.cuda.Event | None, foreseen: bool) -> None:
        """Finds what the posted query wants, which has come when `arrived` has happened; None: it is there, or retrieve
        waits for it. foreseen: whether post_foreseen was called in this step."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to ask the host")

    def end(self, begun: ReferenceSplits | TritonSplits, layer_idx: int) -> Tensor:
        """The whole attention [B, 1, H, D]. Device work."""
        return begun.merge()

    def note_step(self, layer_idx: int) -> None:
        """Counts what the layer did in this step."""

    def turn(self, layer_idx: int) -> None:
        """What the layer does with tokens generated so far, now and then."""

    @abstractmethod
    def captured(self, layer_idx: int) -> tuple[int, ...]:
        """Addresses that change where device work of the layer has to be captured anew."""

    def decode_update_kv_cache(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> None:
        self.make_room(layer_idx)
        self.write_token(key_states, value_states, layer_idx)
        self.count_token(layer_idx)

    def compute(self, query_states: Tensor, layer_idx: int, foreseen: bool = False) -> Tensor:
        """See KV_Cache.compute; foreseen: as for `retrieve`."""
        asks = self.needs_host(layer_idx)
        arrived = None
        if asks:
            self.post_query(query_states, layer_idx)
            if query_states.is_cuda and not self.waits_for_query(layer_idx):
                arrived = torch.cuda.Event()
                arrived.record()
        with self.stats.timed("attention"):
            begun = self.begin(query_states, layer_idx)
        if asks:
            self.retrieve(layer_idx, arrived, foreseen)
        with self.stats.timed("attention"):
            attended = self.end(begun, layer_idx)
        self.note_step(layer_idx)
        self.turn(layer_idx)
        return attended
