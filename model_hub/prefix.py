"""A prompt's prefilled cache that several questions share, in memory or in a folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from cache_hub import STRATEGIES, KV_Cache
from cache_hub.index.tensor_file import check_ids, take
from cache_hub.prefix import Manifest, check_files, fill_cache, read_head, read_manifest, write_prefix
from config import RetroInferConfig
from model_hub.inputs import valid_lengths
from model_hub.llm import GREEDY, LLM, GenerationTiming, until_stop
from model_hub.sampling import Sampler
from model_hub.spec import ModelSpec

# Tokens of the prompt's beginning that both models must continue alike, and by how much their logits may differ
# (relative L2): what two machines' arithmetic does, in float32 and in types of 16 bits.
_PROBE = 16
_SAME, _SAME_16_BITS = 1e-3, 5e-2


@dataclass
class Prefix:
    """A prompt in a cache, with room for questions about it. Questions and answers never enter an index, whatever
    insert_batch is, since each begins where the prompt ends.

    token_ids [1, T] int64, on the CPU. cache: filled; each question begins where the prompt ends. seconds: of the
    prefill and build, or of loading.
    """

    llm: LLM
    strategy: str
    settings: RetroInferConfig
    token_ids: Tensor
    cache: KV_Cache
    seconds: float = 0.0

    @classmethod
    @torch.inference_mode()
    def prefill(
        cls,
        llm: LLM,
        strategy: str,
        settings: RetroInferConfig,
        token_ids: Tensor,
        room: int,
        diagnose: bool = False,
    ) -> Prefix:
        """Reads a prompt [1, T]. room: tokens of the longest question and its answer together. diagnose: as in
        LLM.generate. Raises ValueError for bad input and a strategy that cannot be saved, before work starts."""
        built_settings(strategy, settings)
        lengths = valid_lengths(token_ids, None, llm.spec.vocab_size)
        if len(lengths) != 1:
            raise ValueError(f"token_ids: got {len(lengths)} prompts, allowed: 1, a prefix is one prompt")
        begin = perf_counter()
        cache = llm.init_cache(strategy, _without_growth(settings), lengths, room, diagnose=diagnose)
        llm.prefill(token_ids, None, cache)
        return cls(llm, strategy, settings, token_ids.cpu().long(), cache, perf_counter() - begin)

    @torch.inference_mode()
    def save(
        self, folder: str | Path, tokenizer: Any = None, model_name: str = "", notes: dict[str, Any] | None = None
    ) -> None:
        """Writes the prefix to a new or empty folder, which appears whole or not at all, in place of no other.

        tokenizer: the one that made the token ids; None lets any load them. model_name: for messages. notes: what
        JSON can hold, for the caller. Questions asked before are forgotten. Raises ValueError for a folder that is not
        empty; OSError.
        """
        if any(self.cache.generated):
            self.cache.rewind()
        manifest = Manifest(
            strategy=self.strategy,
            tokens=self.token_ids.shape[1],
            dtype=_name(self.llm.dtype),
            model_name=model_name,
            model=model_facts(self.llm.spec),
            tokenizer=tokenizer_hash(tokenizer),
            built=built_settings(self.strategy, self.settings),
            settings=self.settings.model_dump(),
            notes=notes or {},
        )
        head = {"token_ids": self.token_ids.int(), "probe": _probe(self.llm, self.token_ids)}
        write_prefix(folder, self.cache, head, manifest)

    @classmethod
    @torch.inference_mode()
    def load(
        cls,
        folder: str | Path,
        llm: LLM,
        strategy: str,
        settings: RetroInferConfig,
        room: int,
        tokenizer: Any = None,
        diagnose: bool = False,
    ) -> Prefix:
        """A saved prefix, without prefill: answers are those that the saved one gives with the same `room`.

        Settings of the search may be others than those it was saved with, those of the build may not. room, diagnose:
        as in `prefill`. The files are mapped where the strategy can read them so, and must stay as they are.
        Raises FileNotFoundError where something is missing and ValueError, with the reason, for another version,
        strategy, type, tokenizer, model or build, and for truncated or corrupted files.
        """
        begin = perf_counter()
        manifest = read_manifest(folder)
        check_use(folder, manifest, strategy, settings, llm.dtype, tokenizer)
        _check_model(folder, manifest, llm.spec)
        knobs = _without_growth(settings)
        cache = llm.init_cache(strategy, knobs, [manifest.tokens], room, diagnose=diagnose, from_files=True)
        check_files(folder, manifest)
        head = read_head(folder)
        token_ids = take(head, "token_ids", (1, manifest.tokens), torch.int32).long()
        check_ids(token_ids, "token_ids", llm.spec.vocab_size, start=0)
        _check_probe(folder, manifest, llm, token_ids, take(head, "probe", (llm.spec.vocab_size,), torch.float32))
        fill_cache(cache, folder, manifest)
        return cls(llm, strategy, settings, token_ids, cache, perf_counter() - begin)

    @torch.inference_mode()
    def answer(
        self,
        question_ids: Tensor,
        max_new_length: int,
        sampler: Sampler = GREEDY,
        stop_ids: Collection[int] = (),
    ) -> list[int]:
        """The tokens that follow the prompt and a question [1, Q], which is fed token by token; at most max_new_length
        of them, the last perhaps one of `stop_ids`. Questions asked before are forgotten; `llm.cache` and `llm.timing`
        are then this one's: as prefill counts what `seconds` does, and each token of the question is a decode step.

        Raises ValueError for bad input, and where question and answer exceed the room.
        """
        lengths = valid_lengths(question_ids, None, self.llm.spec.vocab_size)
        if len(lengths) != 1:
            raise ValueError(f"question_ids: got {len(lengths)} questions, allowed: 1 at a time")
        length, room = lengths[0], self.cache.max_new_length
        if max_new_length < 1 or length + max_new_length > room:
            raise ValueError(
                f"max_new_length: got {max_new_length} behind a question of {length} tokens, allowed: at least 1, and "
                f"at most {room} together, the room of this prefix"
            )
        if any(self.cache.generated):
            self.cache.rewind()
        begin = perf_counter()
        for token in question_ids[0]:
            logits = self.llm.decode_step(token[None], self.cache)
        first = sampler(logits)
        rest = self.llm.decode(self.cache, first, max_new_length - 1, sampler, stop_ids)
        tokens = torch.cat((first[:, None], rest), dim=1)[0].tolist()
        self.llm.cache = self.cache
        steps = length + rest.shape[1]
        self.llm.timing = GenerationTiming(self.seconds, 0.0, perf_counter() - begin, steps)
        return until_stop(tokens, stop_ids)


def built_settings(strategy: str, settings: RetroInferConfig) -> dict[str, Any]:
    """KV_Cache.built_settings of a strategy. ValueError where its prefixes cannot be saved, naming those that can."""
    built = STRATEGIES[strategy].built_settings(settings)
    if built is None:
        can = [name for name, cache in STRATEGIES.items() if cache.built_settings(settings) is not None]
        raise ValueError(f"strategy: got {strategy!r}, whose prefixes cannot be saved, allowed: {', '.join(can)}")
    return built


def check_use(
    folder: str | Path,
    manifest: Manifest,
    strategy: str,
    settings: RetroInferConfig,
    dtype: torch.dtype,
    tokenizer: Any = None,
) -> None:
    """Raises ValueError where a saved prefix cannot serve this strategy, build, type or tokenizer; reads no file."""
    if strategy != manifest.strategy:
        raise ValueError(f"strategy: got {strategy!r}, allowed: {manifest.strategy!r}, which {folder} holds")
    if _name(dtype) != manifest.dtype:
        raise ValueError(f"dtype: got {_name(dtype)}, allowed: {manifest.dtype}, in which {folder} was saved")
    built = built_settings(strategy, settings)
    for name in sorted(built.keys() | manifest.built.keys()):
        given, allowed = built.get(name), manifest.built.get(name)
        if given != allowed:
            raise ValueError(f"{name}: got {given!r}, allowed: {allowed!r}, with which {folder} was built")
    if tokenizer is not None and manifest.tokenizer not in ("", tokenizer_hash(tokenizer)):
        raise ValueError(
            f"tokenizer: got one of hash {tokenizer_hash(tokenizer)[:12]}, allowed: that of {manifest.model_name!r}, "
            f"{manifest.tokenizer[:12]}, with which {folder} was saved"
        )


def _without_growth(settings: RetroInferConfig) -> RetroInferConfig:
    graph = settings.attention_aware_graph.model_copy(update={"insert_batch": 0})
    return settings.model_copy(update={"attention_aware_graph": graph})


def model_facts(spec: ModelSpec) -> dict[str, Any]:
    """What of a model's configuration a cache depends on, as JSON holds it."""
    facts = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name != "window"}
    return {**facts, "frequencies": spec.frequencies.double().tolist()}


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of all that decides how a text becomes token ids; "" for None."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str())
    if isinstance(rules, dict):
        rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _check_model(folder: str | Path, manifest: Manifest, spec: ModelSpec) -> None:
    saved = manifest.model
    for name, given in model_facts(spec).items():
        if not _alike(given, saved.get(name)):
            shown = "others" if name == "frequencies" else repr(given)
            allowed = "the same rotary frequencies" if name == "frequencies" else repr(saved.get(name))
            raise ValueError(f"model: got {name} {shown}, allowed: {allowed}, as {_of(manifest)} of {folder} has")


def _check_probe(folder: str | Path, manifest: Manifest, llm: LLM, token_ids: Tensor, saved: Tensor) -> None:
    error = float((_probe(llm, token_ids) - saved).norm() / saved.norm().clamp(min=1e-30))
    most = _SAME if llm.dtype == torch.float32 else _SAME_16_BITS
    if not error <= most:
        raise ValueError(
            f"model: got other weights, with logits behind the first tokens that differ by {error:.2g} (relative), "
            f"allowed: at most {most}, those of {_of(manifest)} that saved {folder}"
        )


def _probe(llm: LLM, token_ids: Tensor) -> Tensor:
    """Logits [V] float32, on the CPU, behind the first tokens of a prompt [1, T]: every weight has a part in them."""
    return llm.logits(token_ids[:, :_PROBE])[0, -1].cpu()


def _alike(given: Any, saved: Any) -> bool:
    if isinstance(given, list):
        return isinstance(saved, list) and len(given) == len(saved) and all(map(_alike, given, saved))
    if isinstance(given, float):
        return isinstance(saved, int | float) and math.isclose(given, saved, rel_tol=1e-5)
    return bool(given == saved)


def _of(manifest: Manifest) -> str:
    return f"the model {manifest.model_name!r}" if manifest.model_name else "the model"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
