"""The protocol every strategy implements, in RetroInfer's names (cache_hub/cache.py there)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .stats import Agreement, CacheStats

if TYPE_CHECKING:
    from config import RetroInferConfig

    from .index import TokenIndex
    from .memory import Need, RunShape


# Tokens: all those of a long prompt would have more elements than 32 bits count.
_CHECKED_AT_ONCE = 1 << 16


class KV_Cache(ABC):
    """Keeps keys and values of all layers, and decides which tokens a decode query sees.

    Model-side tensors are [batch, seq, heads, head_dim], keys already rotated; stores are
    [batch, kv_heads, seq, head_dim]. Order of calls: for every layer prefill_update_kv_cache, dense attention, sync;
    then prepare_cache once; then per step and layer decode_update_kv_cache, compute.

    valid_start [batch]: left-padding tokens of each sequence in the prefill tensors (None: none). max_length: longest
    prompt + max_new_length; max_new_length 0 leaves the split between both open. layer_mapping: {str(layer): device},
    where the layer computes (default: CPU). num_gpus and model_size are taken because RetroInfer's callers pass them;
    nothing depends on them. diagnose: compare every decode step with an exact scan, slowly, and keep the sums in
    stats.agreement. use_cuda_graph, an attribute: decode steps may be replayed as CUDA graphs.
    """

    def __init__(
        self,
        *,
        layer_num: int,
        batch_size: int,
        max_length: int,
        num_key_value_heads: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        max_new_length: int = 0,
        valid_start: Sequence[int] | np.ndarray | None = None,
        layer_mapping: Mapping[str, str] | None = None,
        prefill_bsz: int = 1,
        num_gpus: int = 0,
        model_size: float = 0,
        diagnose: bool = False,
    ) -> None:
        if num_heads % num_key_value_heads:
            raise ValueError(f"num_heads: got {num_heads}, allowed: a multiple of {num_key_value_heads} kv heads")
        if max_length <= max_new_length:
            raise ValueError(f"max_length: got {max_length}, allowed: more than max_new_length = {max_new_length}")
        self.layer_num = layer_num
        self.batch_size = batch_size
        self.max_length = max_length
        self.max_new_length = max_new_length
        self.kv_head = num_key_value_heads
        self.num_heads = num_heads
        self.group_size = num_heads // num_key_value_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.prefill_bsz = min(prefill_bsz, batch_size)
        self.valid_start = [0] * batch_size if valid_start is None else [int(s) for s in valid_start]
        self.prompt_lengths = [0] * batch_size
        self.generated = [0] * layer_num
        mapping = layer_mapping or {}
        self.devices = [torch.device(mapping.get(str(layer), "cpu")) for layer in range(layer_num)]
        self.use_cuda_graph = False
        self.stats = CacheStats(agreement=Agreement.zeros(layer_num, num_heads) if diagnose else None)

    @classmethod
    def chosen(cls, settings: RetroInferConfig) -> type[KV_Cache]:
        """The class that these settings choose, of those that keep the strategy's promise."""
        return cls

    @classmethod
    def options(cls, settings: RetroInferConfig) -> dict[str, Any]:
        """The constructor keywords beyond the common ones that this strategy takes from the configuration."""
        return {}

    @classmethod
    @abstractmethod
    def layer_needs(cls, settings: RetroInferConfig, shape: RunShape, device: torch.device) -> list[Need]:
        """The bytes that one layer will need on `device`, where it computes, and in CPU memory; see memory.py."""

    def prefill_update_kv_cache(
        self, query_states: Tensor, key_states: Tensor, value_states: Tensor, layer_idx: int, start_bdx: int
    ) -> tuple[Tensor, Tensor]:
        """Takes one layer's prompt states of the sequences from start_bdx on.

        query_states [b, L, H, D], key_states and value_states [b, L, Hkv, D]. Returns keys and values without padding,
        for the layer's dense attention. Raises ValueError where sequences of one call are padded differently or a
        state is NaN or infinite (naming layer and position).
        """
        pads = set(self.valid_start[start_bdx : start_bdx + len(key_states)])
        if len(pads) != 1:
            raise ValueError(f"valid_start: got {sorted(pads)} in one prefill call, allowed: one value")
        start = pads.pop()
        q, k, v = (states[:, start:] for states in (query_states, key_states, value_states))
        if k.shape[1] > self.max_length - self.max_new_length:
            raise ValueError(
                f"prompt: got {k.shape[1]} tokens, allowed: at most {self.max_length - self.max_new_length} "
                f"(max_length {self.max_length} - max_new_length {self.max_new_length})"
            )
        for name, states in (("query", q), ("key", k)):
            check_finite(states, name, layer_idx, start_bdx)
        self.prompt_lengths[start_bdx : start_bdx + len(k)] = [k.shape[1]] * len(k)
        self.store_prompt(q, k, v, layer_idx, start_bdx)
        return k, v

    @abstractmethod
    def store_prompt(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, start_bdx: int) -> None:
        """Stores one layer's prompt states, free of padding and checked; layouts as in prefill_update_kv_cache."""

    @classmethod
    def build_key(cls, settings: RetroInferConfig) -> str:
        """Equal for settings that one filled cache can serve, with `retune` between them."""
        return settings.model_dump_json()

    def retune(self, settings: RetroInferConfig) -> None:  # noqa: B027
        """Goes over to settings of the same build key; what was built stays."""

    def rewind(self) -> None:
        """Back to the end of the prompt: forgets generated tokens and what decoding counted. Only for strategies that
        say so."""
        raise NotImplementedError(f"{type(self).__name__} cannot forget what was generated")

    @classmethod
    def built_settings(cls, settings: RetroInferConfig) -> dict[str, Any] | None:
        """Those that what a saved prefix holds depends on, and that must agree where it is loaded; None for a strategy
        that cannot be saved."""
        return None

    def layer_tensors(self, layer_idx: int) -> dict[str, Tensor]:
        """What a prefix keeps of a layer of one sequence, at the end of its prompt, beside its index."""
        raise NotImplementedError

    def layer_index(self, layer_idx: int) -> TokenIndex | None:
        """The index of a layer of one sequence, if it has one."""
        return None

    def restore_layer(self, layer_idx: int, tensors: dict[str, Tensor], index_path: Path | None) -> None:
        """In place of the layer's prefill, for a cache of one sequence: what `layer_tensors` gave, and the file of its
        index. ValueError for tensors that do not fit."""
        raise NotImplementedError

    def sync(self, layer_idx: int, start_bdx: int) -> None:  # noqa: B027
        """Called after the layer's dense attention: builds what the layer needs, or begins to; the tensors of its
        prefill_update_kv_cache may then be let go of, but not written to."""

    def prepare_cache(self) -> None:  # noqa: B027
        """Called once after prefill: waits for what is not done yet."""

    @abstractmethod
    def decode_update_kv_cache(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> None:
        """Appends one token's states [B, 1, Hkv, D] of every sequence."""

    @abstractmethod
    def compute(self, query_states: Tensor, layer_idx: int) -> Tensor:
        """Attention of query_states [B, 1, H, D] over the tokens this strategy selects -> [B, 1, H, D]."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of all tokens, each held once, at the store's type."""
        tokens = sum(self.context_lengths(self.layer_num - 1))
        return 2 * self.layer_num * tokens * self.kv_head * self.head_dim * self.dtype.itemsize

    @property
    def index_bytes(self) -> int:
        """Bytes of everything the strategy adds to the keys and values."""
        return 0

    def _count_centroids(self, scored: int) -> None:
        """That every query head scored so many, in the store's type."""
        self.stats.scored += self.num_heads * scored
        self.stats.scored_bytes += self.num_heads * scored * self.head_dim * self.dtype.itemsize

    def context_lengths(self, layer_idx: int) -> list[int]:
        """Tokens of every sequence that the layer holds now."""
        return [length + self.generated[layer_idx] for length in self.prompt_lengths]


def check_finite(states: Tensor, name: str, layer_idx: int, start_bdx: int) -> None:
    """Raises ValueError naming layer, sequence, position and head of the first NaN or infinity in [b, L, heads, D]."""
    # Both are NaN where any state is; without a copy of the states, of which isfinite makes several.
    ends = [torch.stack(some.aminmax()) for some in states.split(_CHECKED_AT_ONCE, 1)]
    if torch.isfinite(torch.stack(ends)).all():
        return
    b, position, head, _ = (~torch.isfinite(states)).nonzero()[0].tolist()
    value = states[b, position, head][~torch.isfinite(states[b, position, head])][0].item()
    raise ValueError(
        f"{name}_states: got {value} in layer {layer_idx}, sequence {start_bdx + b}, position {position}, head {head}, "
        "allowed: finite values"
    )
