"""The decoder: prefill and decode through a KV cache, and the generation loop made of them."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from attn_hub import full_prefill_attn
from cache_hub import AUTO, KV_Cache, RunShape, check_fits, make_cache, settle
from cache_hub.staged import StagedCache
from config import RetroInferConfig, resolve_strategy
from model_hub.decode_graphs import graphs_of
from model_hub.inputs import check_room, valid_lengths
from model_hub.layers import DecoderLayer
from model_hub.rotary import cos_sin as rotary_angles
from model_hub.sampling import Sampler
from model_hub.spec import ModelSpec

GREEDY = Sampler()


@dataclass(frozen=True)
class GenerationTiming:
    """Seconds of one `generate`: prefill ends with the first token's logits, prepare waits for what the cache still
    builds after it, decode is the `decode_steps` forward steps of the whole batch."""

    prefill_seconds: float
    prepare_seconds: float
    decode_seconds: float
    decode_steps: int


class LLM:
    """A decoder of the Llama or Qwen family whose attention reads a `KV_Cache`; made by `load_model`.

    Public state: `layers` (each with `.device`), `spec`, `dtype`, `max_length` (prompt and new tokens together),
    `layer_mapping` {"0": "cuda:0", ..}, `eos_ids`, `progress` (False: no progress bars; they show on terminals only),
    `predicts` (False: no search begins before its query is there), `mlp_chunk` (tokens of a prompt that projections and
    MLP take at a time), and after `generate` its `cache` and `timing`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: list[DecoderLayer],
        embedding: Tensor,
        norm: Tensor,
        lm_head: Tensor,
        max_length: int,
        eos_ids: Collection[int],
    ) -> None:
        """embedding [V, d] on the first layer's device; norm [d] and lm_head [V, d] on the last layer's."""
        self.spec = spec
        self.layers = layers
        self.embedding = embedding
        self.norm = norm
        self.lm_head = lm_head
        self.max_length = max_length
        self.eos_ids = frozenset(eos_ids)
        self.layer_mapping = {str(index): str(layer.device) for index, layer in enumerate(layers)}
        self.frequencies = spec.frequencies.to(layers[0].device)
        self.progress = True
        self.predicts = True
        self.mlp_chunk = 16384
        self.cache: KV_Cache | None = None
        self.timing: GenerationTiming | None = None

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @torch.inference_mode()
    def generate(
        self,
        attention_type: str,
        inputs_ids: Tensor,
        attention_masks: Tensor | None,
        max_new_length: int,
        attn_config: dict[str, Any],
        do_sample: bool = False,
        temperature: float = 0.6,
        top_p: float = 0.95,
        top_k: int = 20,
        ignore_eos: bool = True,
        prefill_bsz: int = 1,
        prefill_method: str = "full",
        diagnose: bool = False,
    ) -> list[list[int]]:
        """New token ids of each sequence; RetroInfer's signature and meaning, and `diagnose`.

        attention_type: "Full_Flash_Attn", "RetroInfer" (the strategy that attn_config names) or a strategy's name.
        inputs_ids, attention_masks: [B, L], left-padded; no mask means that all tokens are valid.
        attn_config: {"RetroInfer": {..}} as `generate_config` makes it.
        ignore_eos: True gives exactly max_new_length tokens, False ends each sequence with its first end token.
        prefill_bsz: sequences that are prefilled together, where all are equally long (else one by one).
        diagnose: compare each decode step with an exact scan, see `cache.stats.agreement`; slow.
        Raises ValueError before work starts for input that cannot be served; see also `inputs` and `Sampler`.
        """
        if prefill_method != "full":
            raise ValueError(f"prefill_method {prefill_method!r} is not supported; allowed: 'full'")
        if not isinstance(attn_config, dict) or "RetroInfer" not in attn_config:
            raise ValueError(
                f'attn_config must be {{"RetroInfer": {{..}}}}, as of generate_config, not {attn_config!r}'
            )
        settings = RetroInferConfig(**attn_config["RetroInfer"])
        strategy = resolve_strategy(attention_type, settings)
        sampler = Sampler(do_sample, temperature, top_p, top_k)
        lengths = valid_lengths(inputs_ids, attention_masks, self.spec.vocab_size)
        self.cache = None  # frees the cache of an earlier call before a new one is made
        cache = self.init_cache(strategy, settings, lengths, max_new_length, prefill_bsz, diagnose)

        start = perf_counter()
        logits = self._prefill_batch(inputs_ids, lengths, [cache], prefill_bsz)
        self._synchronize()
        prefilled = perf_counter()
        cache.prepare_cache()
        self._synchronize()
        prepared = perf_counter()
        stop_ids = frozenset() if ignore_eos else self.eos_ids
        first = sampler(logits)
        rest = self.decode(cache, first, max_new_length - 1, sampler, stop_ids)
        tokens = torch.cat((first[:, None], rest), dim=1).tolist()
        self.cache = cache
        self.timing = GenerationTiming(
            prefilled - start, prepared - prefilled, perf_counter() - prepared, decode_steps=rest.shape[1]
        )
        return [until_stop(sequence, stop_ids) for sequence in tokens]

    def settle(
        self, strategy: str, settings: RetroInferConfig, lengths: list[int], max_new_length: int, prefill_bsz: int = 1
    ) -> tuple[str, RetroInferConfig]:
        """What "auto" is for prompts of these lengths and the memory that is available now; other strategies as they
        are. See cache_hub.settle."""
        return settle([(strategy, settings)], self._shape(lengths, max_new_length, prefill_bsz))[0]

    def init_cache(
        self,
        strategy: str,
        settings: RetroInferConfig,
        lengths: list[int],
        max_new_length: int,
        prefill_bsz: int = 1,
        diagnose: bool = False,
        from_files: bool = False,
    ) -> KV_Cache:
        """An empty cache of `strategy` for prompts of these lengths; see `init_caches`."""
        return self.init_caches([(strategy, settings)], lengths, max_new_length, prefill_bsz, diagnose, from_files)[0]

    def init_caches(
        self,
        builds: Sequence[tuple[str, RetroInferConfig]],
        lengths: list[int],
        max_new_length: int,
        prefill_bsz: int = 1,
        diagnose: bool = False,
        from_files: bool = False,
    ) -> list[KV_Cache]:
        """Empty caches of strategies and their settings, which one `prefill` of prompts of these lengths will fill; of
        "auto" as `settle` says, which stats.notes tells.

        Raises ValueError where `check_memory` does; from_files: only when the prompts do not fit `max_length`, since a
        saved prefix is not built, and its files need not be in memory.
        """
        check_room(lengths, max_new_length, self.max_length, self.spec.window)
        shape = self._shape(lengths, max_new_length, prefill_bsz)
        settled = settle(builds, shape)
        if not from_files:
            check_fits(settled, shape)
        common: dict[str, Any] = {
            "valid_start": None,
            "layer_num": self.spec.layer_num,
            "batch_size": len(lengths),
            "max_length": max(lengths) + max_new_length,
            "num_key_value_heads": self.spec.num_key_value_heads,
            "num_heads": self.spec.num_heads,
            "head_dim": self.spec.head_dim,
            "dtype": self.dtype,
            "layer_mapping": self.layer_mapping,
            "prefill_bsz": _group_size(lengths, prefill_bsz),
            "max_new_length": max_new_length,
            "diagnose": diagnose,
        }
        caches = [make_cache(strategy, settings, **common) for strategy, settings in settled]
        for cache, (asked, settings), (strategy, _) in zip(caches, builds, settled, strict=True):
            cache.use_cuda_graph = settings.use_cuda_graph
            if asked == AUTO:
                cache.stats.note(f"auto is {strategy} here{', scanned on the GPU' if strategy == 'flat' else ''}")
        return caches

    def check_memory(
        self,
        builds: Sequence[tuple[str, RetroInferConfig]],
        lengths: list[int],
        max_new_length: int,
        prefill_bsz: int = 1,
    ) -> None:
        """Raises ValueError when such prompts do not fit `max_length`, and when caches of these strategies and settings
        will not fit, together, the memory that is available now; see `check_fits`."""
        check_room(lengths, max_new_length, self.max_length, self.spec.window)
        shape = self._shape(lengths, max_new_length, prefill_bsz)
        check_fits(settle(builds, shape), shape)

    def _shape(self, lengths: list[int], max_new_length: int, prefill_bsz: int) -> RunShape:
        sizes = (self.spec.num_heads, self.spec.num_key_value_heads, self.spec.head_dim, self.spec.hidden_size)
        devices, group = tuple(layer.device for layer in self.layers), _group_size(lengths, prefill_bsz)
        mlp = {"mlp_size": self.layers[0].down.weight.shape[1], "chunk": self.mlp_chunk}
        return RunShape(tuple(lengths), max_new_length, *sizes, self.dtype, devices, group, **mlp)

    @torch.inference_mode()
    def prefill(
        self, ids: Tensor, masks: Tensor | None, caches: KV_Cache | Sequence[KV_Cache], prefill_bsz: int = 1
    ) -> Tensor:
        """Fills one or more caches with the prompts [B, L] and prepares them for decoding.

        Returns the logits [B, V] float32 of each prompt's last token. The caches are ones that `init_cache` made with
        the prompts' lengths and the same prefill_bsz. Raises ValueError for bad input, see `valid_lengths`.
        """
        filled = [caches] if isinstance(caches, KV_Cache) else caches
        logits = self._prefill_batch(ids, valid_lengths(ids, masks, self.spec.vocab_size), filled, prefill_bsz)
        for cache in filled:
            cache.prepare_cache()
        return logits

    @torch.inference_mode()
    def decode_step(self, tokens: Tensor, cache: KV_Cache) -> Tensor:
        """Appends one token to each sequence: tokens [B] -> logits [B, V] float32 of the next ones.

        The tokens may be forced ones (teacher forcing). Raises ValueError for a cache that is not prefilled, or full.
        """
        lengths = cache.context_lengths(0)
        if min(lengths) == 0:
            raise ValueError("decode_step needs a prefilled cache, this one has an empty sequence")
        if max(lengths) >= cache.max_length:
            raise ValueError(f"the cache is full: it was made for {cache.max_length} tokens")
        graphs = graphs_of(self, cache)
        if graphs is not None:
            return graphs.step(tokens)
        hidden = F.embedding(tokens.to(self.device)[:, None], self.embedding)
        positions = torch.tensor(lengths).to(self.device, non_blocking=True)
        cos, sin = self.cos_sin(positions[:, None])
        foreseen = False
        for index, layer in enumerate(self.layers):
            with _on(layer.device):
                hidden, cos, sin = (states.to(layer.device) for states in (hidden, cos, sin))
                query, key, value = layer.project(hidden, cos, sin)
                cache.decode_update_kv_cache(key, value, index)
                if isinstance(cache, StagedCache):
                    told, foreseen = foreseen, self.foresee(cache, index, hidden, cos, sin)
                    attended = cache.compute(query, index, told)
                    if foreseen:
                        cache.expect_query(index + 1)
                else:
                    attended = cache.compute(query, index)
                hidden = layer.finish(hidden, attended, self.mlp_chunk)
        return self.project_out(hidden[:, -1])

    def foresee(self, cache: StagedCache, index: int, hidden: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Posts what the query of the layer behind layer `index` will be about, by the states [B, 1, d] that enter this
        one, and says so; not where its attention makes nothing of that, or it computes elsewhere. Device work."""
        behind = index + 1
        if not self.predicts or behind == len(self.layers) or not cache.foresees(behind):
            return False
        if self.layers[behind].device != self.layers[index].device:
            return False
        cache.post_foreseen(self.layers[behind].predict_query(hidden, cos, sin), behind)
        return True

    @torch.inference_mode()
    def decode(
        self,
        cache: KV_Cache,
        first_tokens: Tensor,
        steps: int,
        sampler: Sampler = GREEDY,
        stop_ids: Collection[int] = (),
    ) -> Tensor:
        """The tokens [B, n] int64 that follow `first_tokens` [B]; n = `steps`, or fewer once every sequence has had
        a token of `stop_ids` (what a sequence has behind its own is noise)."""
        tokens, produced = first_tokens, []
        stop = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=first_tokens.device)
        stopped = torch.isin(first_tokens, stop)
        for _ in tqdm(range(steps), desc="decode", unit="token", disable=self._hide_bars(), leave=False):
            if stop_ids and bool(stopped.all()):
                break
            tokens = sampler(self.decode_step(tokens, cache))
            produced.append(tokens)
            if stop_ids:
                stopped |= torch.isin(tokens, stop)
        return torch.stack(produced, dim=1) if produced else first_tokens.new_empty((len(first_tokens), 0))

    @torch.inference_mode()
    def logits(self, ids: Tensor, masks: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] float32 at every token of left-padded prompts under full attention; 0 at padding."""
        lengths = valid_lengths(ids, masks, self.spec.vocab_size)
        out = torch.zeros((*ids.shape, self.spec.vocab_size), device=self.layers[-1].device)
        with self._layer_bar(len(lengths)) as bar:
            for row, length in enumerate(lengths):
                hidden = self._forward(ids[row : row + 1, -length:], (), row, bar)
                out[row, -length:] = self.project_out(hidden[0])
        return out

    def _prefill_batch(self, ids: Tensor, lengths: list[int], caches: Sequence[KV_Cache], prefill_bsz: int) -> Tensor:
        step = _group_size(lengths, prefill_bsz)
        starts = range(0, len(lengths), step)
        last = []
        with self._layer_bar(len(starts)) as bar:
            for start in starts:
                group = ids[start : start + step, -lengths[start] :]
                last.append(self._forward(group, caches, start, bar)[:, -1].clone())  # a view would hold all tokens
        return self.project_out(torch.cat(last))

    def _forward(self, ids: Tensor, caches: Sequence[KV_Cache], start_bdx: int, bar: tqdm) -> Tensor:
        """Last layer's states [b, L, d] of equally long prompts ids [b, L], sequences start_bdx.. of the caches.

        What is held at a time: see cache_hub.memory.prompt_state_bytes.
        """
        hidden = F.embedding(ids.to(self.device), self.embedding)
        cos, sin = self.cos_sin(torch.arange(ids.shape[1], device=self.device)[None])
        for index, layer in enumerate(self.layers):
            with _on(layer.device):
                hidden, cos, sin = (states.to(layer.device) for states in (hidden, cos, sin))
                query, key, value = layer.project_prompt(hidden, cos, sin, self.mlp_chunk)
                for cache in caches:
                    cache.prefill_update_kv_cache(query, key, value, index, start_bdx)
                attended = full_prefill_attn(query, key, value, causal=True)
                for cache in caches:
                    cache.sync(index, start_bdx)
                del query, key, value
                hidden = layer.finish(hidden, attended, self.mlp_chunk)
                del attended
            bar.update()
        return hidden

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of the rotation at positions [b or 1, L]; see rotary.cos_sin."""
        return rotary_angles(positions, self.frequencies, self.spec.rope_scaling, self.dtype)

    def project_out(self, hidden: Tensor) -> Tensor:
        """Logits [.., V] float32 of the last layer's states [.., d]."""
        normed = F.rms_norm(hidden, self.norm.shape, self.norm, self.spec.norm_eps)
        return F.linear(normed, self.lm_head).float()

    def _layer_bar(self, groups: int) -> tqdm:
        total = groups * len(self.layers)
        return tqdm(total=total, desc="prefill and build", unit="layer", disable=self._hide_bars(), leave=False)

    def _hide_bars(self) -> bool | None:
        return None if self.progress else True

    def _synchronize(self) -> None:
        for device in {layer.device for layer in self.layers if layer.device.type == "cuda"}:
            torch.cuda.synchronize(device)


def _group_size(lengths: list[int], prefill_bsz: int) -> int:
    """Sequences per prefill: prefill_bsz at most, 1 where lengths differ, because padding would be computed."""
    if prefill_bsz < 1:
        raise ValueError(f"prefill_bsz must be at least 1, got {prefill_bsz}")
    return min(prefill_bsz, len(lengths)) if len(set(lengths)) == 1 else 1


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: Triton launches on that, not on its tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def until_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens up to the first stop token, which is kept."""
    ends = [index for index, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens
