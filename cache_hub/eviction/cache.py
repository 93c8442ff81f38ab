"""A cache that keeps a budget of each prompt's tokens, on the layer's device, and forgets the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attn_hub import WeightedPart, append_token, decode_splits
from config import ConfigError

from ..memory import Need, RunShape
from ..staged import StagedCache
from ..stats import CacheStats
from .importance import score_entropy, select_top_k_tokens
from .scorer import Scorer

if TYPE_CHECKING:
    from attn_hub.kernels.weighted_decode import TritonSplits
    from attn_hub.reference import ReferenceSplits
    from config import RetroInferConfig

logger = logging.getLogger(__name__)


class EvictionCache(StagedCache):
    """Keeps, of each prompt longer than the budget, the tokens that a scorer ranks best, for each kv head its own, and
    attends to all of them. Sinks and window of the scorer are kept, and count.

    The budget is `budget` tokens, or the share `budget_share` of each prompt's, if that is above 0. Generated tokens
    are appended or, with a scorer that evicts while decoding, push out others, so that a layer never holds more.
    """

    scorer_class: ClassVar[type[Scorer]]

    def __init__(self, *, scorer: Scorer, budget: int, budget_share: float, **common: Any) -> None:
        super().__init__(**common)
        self.scorer, self.budget, self.budget_share = scorer, budget, budget_share
        self.make_scores: Callable[[Tensor, Tensor], Tensor] = scorer.score
        prompts = [self.max_length - self.max_new_length - start for start in self.valid_start]
        # [B, Hkv, rows, D]; of what evicts while decoding, the tokens' places and attention so far [B, Hkv, rows].
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._mass: list[Tensor] = []
        # [B, Hkv] int32: tokens held, and how many may be.
        self._lengths: list[Tensor] = []
        self._limits: list[Tensor] = []
        self._kept = [[0] * self.batch_size for _ in range(self.layer_num)]
        self._entropies: list[float] = []
        for layer, device in enumerate(self.devices):
            shape = (self.batch_size, self.kv_head, max(self._room(layer, tokens) for tokens in prompts))
            for stores in (self._keys, self._values):
                stores.append(torch.zeros(*shape, self.head_dim, dtype=self.dtype, device=device))
            self._lengths.append(torch.zeros(shape[:2], dtype=torch.int32, device=device))
            if scorer.evicts_while_decoding:
                self._limits.append(torch.full(shape[:2], shape[2], dtype=torch.int32, device=device))
                self._positions.append(torch.zeros(shape, dtype=torch.int32, device=device))
                self._mass.append(torch.zeros(shape, device=device))

    @classmethod
    def options(cls, settings: RetroInferConfig) -> dict[str, Any]:
        own = settings.eviction
        return {
            "scorer": cls.scorer_class.of(settings),
            "budget": own.budget,
            "budget_share": own.budget_share,
        }

    @classmethod
    def layer_needs(cls, settings: RetroInferConfig, shape: RunShape, device: torch.device) -> list[Need]:
        """PyramidKV's layers count as if each had the mean budget."""
        o, new = cls.options(settings), shape.max_new_length
        budgets = [_budget(tokens=length, **o) for length in shape.lengths]
        if o["scorer"].evicts_while_decoding:
            room = min(max(budgets), shape.longest + new)
        else:
            room = min(max(budgets), shape.longest) + new
        needs = [Need(device, "keys and values", 2 * shape.batch * room * shape.row_bytes)]
        scratch = shape.prefill_bsz * o["scorer"].scratch_bytes(shape, device.type == "cuda")
        if scratch and shape.longest > max(budgets):
            needs.append(Need(device, "the scores of a layer's prompt", scratch, "build"))
        return needs

    def _room(self, layer: int, tokens: int) -> int:
        """Rows for a prompt of so many tokens and what is generated behind it."""
        if self.scorer.evicts_while_decoding:
            return min(self._budget_of(tokens), tokens + (self.max_new_length or self.max_length))
        return self._capacity(layer, tokens) + (self.max_new_length or self.max_length)

    def _make_room(self, layer: int, rows: int) -> None:
        """Grows the layer's stores where a prompt keeps more there than was expected by its padding."""
        for tables in (self._keys, self._values, self._positions, self._mass):
            if tables and tables[layer].shape[2] < rows:
                table = tables[layer]
                more = table.new_zeros(*table.shape[:2], rows - table.shape[2], *table.shape[3:])
                tables[layer] = torch.cat((table, more), 2)

    def _capacity(self, layer: int, tokens: int) -> int:
        """How many of a prompt's tokens the layer keeps."""
        budget = self._budget_of(tokens)
        return tokens if tokens <= budget else self.scorer.capacity(budget, layer, self.layer_num, tokens)

    def _budget_of(self, tokens: int) -> int:
        return _budget(self.scorer, self.budget, self.budget_share, tokens)

    def store_prompt(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, start_bdx: int) -> None:
        sequences, tokens = slice(start_bdx, start_bdx + len(k)), k.shape[1]
        kept, rolls = self._capacity(layer_idx, tokens), self.scorer.evicts_while_decoding
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        positions = torch.arange(tokens, device=k.device).expand(*keys.shape[:3])
        with self.stats.timed("build"):
            if kept < tokens or self.scorer.sums_attention:
                with self.stats.timed("score"):
                    scores = self.make_scores(q, k)
            if kept < tokens:
                with self.stats.timed("select"):
                    positions = select_top_k_tokens(scores, kept, self.scorer.sinks, self.scorer.window)
                    self._entropies.append(score_entropy(scores).mean().item())
                rows = positions[..., None].expand(-1, -1, -1, self.head_dim)
                keys, values = keys.gather(2, rows), values.gather(2, rows)
            self._make_room(layer_idx, self._room(layer_idx, tokens))
            self._keys[layer_idx][sequences, :, :kept] = keys
            self._values[layer_idx][sequences, :, :kept] = values
            self._lengths[layer_idx][sequences] = kept
            if rolls:
                self._limits[layer_idx][sequences] = min(self._budget_of(tokens), self._keys[layer_idx].shape[2])
                self._positions[layer_idx][sequences, :, :kept] = positions.int()
                if self.scorer.sums_attention:
                    self._mass[layer_idx][sequences, :, :kept] = scores.gather(2, positions)
        self._kept[layer_idx][sequences] = [kept] * len(k)

    def prepare_cache(self) -> None:
        """Logs what the prompts were reduced to."""
        seconds, scored = self.stats.seconds, self._entropies
        entropy = f"{sum(scored) / len(scored):.2f} nats" if scored else "none, nothing was evicted"
        logger.info(
            "%s: %s tokens, %s kept in the first layer, %.3f s for scores, %.3f s for selection, score entropy %s",
            self.scorer_class.__name__, self.prompt_lengths, self._kept[0], seconds["score"], seconds["select"],
            entropy,
        )  # fmt: skip

    def write_token(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> None:
        stores = self._keys[layer_idx], self._values[layer_idx]
        lengths = self._lengths[layer_idx]
        if not self.scorer.evicts_while_decoding:
            append_token(*stores, lengths, key_states, value_states)
            return
        positions, mass = self._positions[layer_idx], self._mass[layer_idx]
        here = torch.arange(positions.shape[2], device=positions.device) < lengths[..., None]
        latest = positions.masked_fill(~here, -1).amax(2, keepdim=True)
        stays = (positions < self.scorer.sinks) | (positions > latest + 1 - self.scorer.window) | ~here
        priority = self.scorer.priority(positions, mass).masked_fill(stays, float("inf"))
        full = lengths >= self._limits[layer_idx]
        slot = torch.where(full, priority.argmin(2), lengths.long())[..., None]
        for store, states in zip(stores, (key_states, value_states), strict=True):
            store.scatter_(2, slot[..., None].expand(-1, -1, -1, self.head_dim), states.transpose(1, 2))
        positions.scatter_(2, slot, latest + 1)
        mass.scatter_(2, slot, 0.0)
        lengths.add_(~full)

    def begin(self, query_states: Tensor, layer_idx: int) -> ReferenceSplits | TritonSplits:
        part = WeightedPart(self._keys[layer_idx], self._values[layer_idx], None, None, self._lengths[layer_idx])
        begun = decode_splits(query_states, [part])
        begun.attend(1)
        if self.scorer.sums_attention:
            self._mass[layer_idx] += self._attended(query_states, layer_idx)
        return begun

    def _attended(self, query_states: Tensor, layer_idx: int) -> Tensor:
        """[B, Hkv, rows] float32: what the queries [B, 1, H, D] give each token held, in the mean over a group."""
        keys, lengths = self._keys[layer_idx], self._lengths[layer_idx]
        asked = query_states.reshape(self.batch_size, self.kv_head, self.group_size, self.head_dim)
        logits = (asked @ keys.transpose(2, 3)).float() * self.head_dim**-0.5
        nobody = torch.arange(keys.shape[2], device=keys.device) >= lengths[..., None]
        return logits.masked_fill(nobody[:, :, None], float("-inf")).softmax(-1).mean(2)

    def rewind(self) -> None:
        if self.scorer.evicts_while_decoding:
            super().rewind()
        for lengths, generated in zip(self._lengths, self.generated, strict=True):
            lengths -= generated
        self.generated = [0] * self.layer_num
        self.stats = CacheStats(agreement=self.stats.agreement)

    def held(self, layer_idx: int) -> list[int]:
        """Tokens of every sequence that the layer has kept and generated, and not evicted."""
        held = [kept + self.generated[layer_idx] for kept in self._kept[layer_idx]]
        if not self.scorer.evicts_while_decoding:
            return held
        room = self._keys[layer_idx].shape[2]
        limits = [min(self._budget_of(length), room) for length in self.prompt_lengths]
        return list(map(min, held, limits))

    def note_step(self, layer_idx: int) -> None:
        self.stats.attended += self.kv_head * sum(self.held(layer_idx))
        self.stats.attended_of += self.kv_head * sum(self.context_lengths(layer_idx))

    def captured(self, layer_idx: int) -> tuple[int, ...]:
        return (self._keys[layer_idx].data_ptr(),)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that are held."""
        tokens = sum(sum(self.held(layer)) for layer in range(self.layer_num))
        return 2 * tokens * self.kv_head * self.head_dim * self.dtype.itemsize


def evicting(scorer: type[Scorer]) -> type[EvictionCache]:
    """The cache of a scorer."""
    return type(f"{scorer.__name__}Cache", (EvictionCache,), {"scorer_class": scorer, "__doc__": scorer.__doc__})


def _budget(scorer: Scorer, budget: int, budget_share: float, tokens: int) -> int:
    """Tokens that a prompt of so many may keep. ConfigError where sinks and window, and one more, do not fit in."""
    most, least = (round(budget_share * tokens) if budget_share else budget), scorer.sinks + scorer.window + 1
    if most >= least:
        return most
    key = f"eviction.budget_share: got {budget_share} of {tokens} tokens," if budget_share else "eviction.budget: got"
    raise ConfigError(
        f"{key} {most}, allowed: at least {least}, one more than the {scorer.sinks} sinks and the window of "
        f"{scorer.window} that are kept"
    )
