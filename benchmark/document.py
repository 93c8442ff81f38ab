"""The main job with a document that is read once: its prefix is saved or loaded, and a question about it answered."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch

from cache_hub import AUTO
from cache_hub.prefix import Manifest, check_free, read_manifest
from config import RetroInferConfig, config_from_args, resolve_strategy
from model_hub import LLM, Prefix, Sampler, load_model, load_tokenizer
from model_hub.loading import DTYPES
from model_hub.prefix import built_settings, check_use

from .measure import record
from .needle import NeedlePrompt, question_frame
from .results import environment


@dataclass(frozen=True)
class Asked:
    """What is asked: the text that follows the document, what the answer must contain (None: anything is right), and
    what stands before and after any other question about the document."""

    question: str
    expected: str | None
    frame: tuple[str, str]

    def other(self, question: str) -> Asked:
        """Another question about the same document."""
        return Asked(question.join(self.frame), None, self.frame)

    def notes(self) -> dict[str, Any]:
        """What a saved prefix notes down for `from_notes`."""
        return {"question": self.question, "expected": self.expected, "frame": list(self.frame)}

    @classmethod
    def from_notes(cls, folder: str, notes: dict[str, Any]) -> Asked:
        """ValueError for a prefix that was not saved by this job."""
        if not notes.keys() >= {"question", "expected", "frame"}:
            raise ValueError(f"load_prefix: got {folder}, which notes no question, allowed: what --save_prefix made")
        before, after = notes["frame"]
        return cls(notes["question"], notes["expected"], (before, after))


def check_document_args(args: argparse.Namespace) -> None:
    """ValueError for flags of a prefix that do not go together, or with the others."""
    if args.save_prefix is None and args.load_prefix is None:
        if args.question is not None:
            raise ValueError(f"question: got {args.question!r}, allowed: beside --save_prefix or --load_prefix")
        return
    if args.save_prefix is not None and args.load_prefix is not None:
        raise ValueError(
            f"save_prefix, load_prefix: got {args.save_prefix!r} and {args.load_prefix!r}, allowed: one of them"
        )
    if args.batch_size != 1:
        raise ValueError(f"batch_size: got {args.batch_size}, allowed: 1, a prefix is one document")
    if args.question is not None and not args.question.strip():
        raise ValueError(f"question: got {args.question!r}, allowed: a text")
    if args.load_prefix is not None and args.data_path is not None:
        raise ValueError(
            f"data_path: got {args.data_path!r}, allowed: none beside --load_prefix, which has the document"
        )
    if args.save_prefix is not None:
        check_free(args.save_prefix)


def asked_about(
    args: argparse.Namespace, tokenizer: Any, data: tuple[list[str], list[str]] | None, needle: NeedlePrompt | None
) -> tuple[str, Asked]:
    """The document to save, and the question: of a needle prompt, or of data with --question."""
    if needle is not None:
        asked = Asked(needle.question, needle.answer, question_frame(tokenizer))
        return needle.document, asked if args.question is None else asked.other(args.question)
    assert data is not None
    (prompts, outputs) = data
    if len(prompts) != 1 or args.question is None:
        raise ValueError(
            f"data_path: got {len(prompts)} inputs and question {args.question!r}, allowed beside --save_prefix: one "
            "input, the document, and a --question about it"
        )
    frame = ("\n", "")
    return prompts[0], Asked(args.question.join(frame), outputs[0], frame)


def save_and_answer(args: argparse.Namespace, tokenizer: Any, document: str, asked: Asked, seed: int) -> dict[str, Any]:
    """Reads the document, saves it and answers; as simple_test.run."""
    special_tokens = args.data_path is not None
    ids = tokenizer(document, return_tensors="pt", add_special_tokens=special_tokens).input_ids
    question = _question_ids(tokenizer, asked)
    if ids.shape[1] == 0:
        raise ValueError("data_path: got an empty document, allowed: at least one token")
    attn_config, strategy, settings = _configure(args, ids.shape[1])
    built_settings(strategy, settings)
    llm = _load(args, tokenizer, ids.shape[1] + question.shape[1] + args.gen_len)
    print(f"{strategy}: reads {ids.shape[1]} tokens", file=sys.stderr)
    prefix = Prefix.prefill(llm, strategy, settings, ids, question.shape[1] + args.gen_len, args.diagnose)
    prefix.save(args.save_prefix, tokenizer, args.model_name, asked.notes())
    return _outcome(args, tokenizer, prefix, question, asked, attn_config, seed)


def load_and_answer(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Answers a question about a saved document, without prefill; as simple_test.run."""
    folder = args.load_prefix
    manifest: Manifest = read_manifest(folder)
    asked = Asked.from_notes(folder, manifest.notes)
    if args.question is not None:
        asked = asked.other(args.question)
    attn_config, strategy, settings = _configure(args, manifest.tokens)
    tokenizer = load_tokenizer(args.model_name)
    check_use(folder, manifest, strategy, settings, DTYPES[args.dtype], tokenizer)
    question = _question_ids(tokenizer, asked)
    llm = _load(args, tokenizer, manifest.tokens + question.shape[1] + args.gen_len)
    room = question.shape[1] + args.gen_len
    prefix = Prefix.load(folder, llm, strategy, settings, room, tokenizer, args.diagnose)
    print(f"{strategy}: {manifest.tokens} tokens loaded in {prefix.seconds:.2f} s", file=sys.stderr)
    outcome = _outcome(args, tokenizer, prefix, question, asked, attn_config, seed)
    outcome["results"][strategy] |= {"prefill_seconds": 0.0, "load_seconds": prefix.seconds}
    return outcome


def _configure(args: argparse.Namespace, tokens: int) -> tuple[dict[str, Any], str, RetroInferConfig]:
    attn_config = config_from_args(args, args.model_name, tokens)
    settings = RetroInferConfig(**attn_config["RetroInfer"])
    strategy = resolve_strategy(args.attn_type, settings)
    # What is built once and saved is an index.
    return attn_config, "attention_aware_graph" if strategy == AUTO else strategy, settings


def _load(args: argparse.Namespace, tokenizer: Any, tokens: int) -> LLM:
    return load_model(args.model_name, tokens, args.dtype, args.device, tokenizer, lora=args.lora)


def _question_ids(tokenizer: Any, asked: Asked) -> torch.Tensor:
    return tokenizer(asked.question, return_tensors="pt", add_special_tokens=False).input_ids


def _outcome(
    args: argparse.Namespace,
    tokenizer: Any,
    prefix: Prefix,
    question: torch.Tensor,
    asked: Asked,
    attn_config: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    torch.manual_seed(seed)
    llm = prefix.llm
    tokens = prefix.answer(question, args.gen_len, Sampler(args.do_sample), llm.eos_ids)
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    assert llm.timing is not None
    result = {
        "answer": answer,
        "correct": None if asked.expected is None else asked.expected in answer,
        "prompt_tokens": [prefix.token_ids.shape[1]],
        "question_tokens": [question.shape[1]],
        "new_tokens": [len(tokens)],
        **record(prefix.cache, llm.timing),
    }
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    return {
        "config": {**settings, "asked": asked.question, "expected": [asked.expected], **attn_config},
        "environment": environment(),
        "results": {prefix.strategy: result},
    }
