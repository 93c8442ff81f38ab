"""Needle questions over depths and haystacks, full attention beside a retrieval strategy: how many answers are right.

python -m benchmark.needles --output FILE asks 20 at 4,096 tokens. The file is rewritten after every question; a run
with the same settings goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from config import RetroInferConfig, add_config_args, config_from_args, resolve_strategy
from model_hub import load_model, load_tokenizer

from .measure import measure
from .needle import HAYSTACKS, needle_prompt
from .results import check_writable, environment, write_json


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cuda:0" if gpu else "cpu")
    parser.add_argument("--dtype", default="bf16" if gpu else "fp32")
    parser.add_argument("--context_len", type=int, default=4096)
    parser.add_argument("--gen_len", type=int, default=16)
    parser.add_argument("--count", type=int, default=20, help="questions, shared by the haystacks")
    parser.add_argument("--output", required=True)
    add_config_args(parser)
    return parser.parse_args(argv)


def questions(count: int) -> list[tuple[str, float, int]]:
    """(haystack, depth, seed) of every question: haystacks in turn, depths spread evenly over each."""
    each = -(-count // len(HAYSTACKS))
    spread = [(haystack, i / max(each - 1, 1), i) for i in range(each) for haystack in HAYSTACKS]
    return spread[:count]


def resume(path: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Answers that an earlier run with the same settings left in `path`. Raises ValueError for other settings."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["config"] != json.loads(json.dumps(config)):
        raise ValueError(f"output: {path} holds results of other settings; give another file or remove it")
    return earlier["questions"]


def summary(answered: dict[str, dict[str, Any]], strategies: list[str]) -> dict[str, Any]:
    """Right answers and mean costs of every strategy."""
    totals: dict[str, Any] = {}
    for strategy in strategies:
        results = [question["results"][strategy] for question in answered.values()]
        mean = {
            key: sum(result[key] for result in results) / len(results)
            for key in ("prefill_seconds", "build_seconds", "ms_per_token", "attended_share", "scored_share")
        }
        totals[strategy] = {"right": sum(result["correct"] for result in results), "of": len(results), **mean}
    return totals


def main() -> int:
    args = parse_args()
    attn_config = config_from_args(args, args.model_name, args.context_len)
    config = {**{key: value for key, value in vars(args).items() if key != "output"}, **attn_config}
    check_writable(args.output)
    answered, where = resume(Path(args.output), config), environment()
    strategy = resolve_strategy(args.attn_type, RetroInferConfig(**attn_config["RetroInfer"]))
    strategies = list(dict.fromkeys(("full", strategy)))
    tokenizer = load_tokenizer(args.model_name)
    llm = load_model(args.model_name, args.context_len, args.dtype, args.device, tokenizer)
    llm.progress = False
    for haystack, depth, seed in tqdm(questions(args.count), unit="question", disable=None):
        key = f"{haystack}/{depth:.3f}"
        if key in answered:
            continue
        needle = needle_prompt(tokenizer, args.context_len - args.gen_len, depth, haystack, seed)
        results = {
            name: measure(
                llm,
                tokenizer,
                [needle.text],
                [needle.answer],
                name,
                attn_config,
                max_new_length=args.gen_len,
                ignore_eos=False,
            )
            for name in strategies
        }
        answered[key] = {"expected": needle.answer, "results": results}
        outcome = {"config": config, "environment": where, "summary": summary(answered, strategies)}
        write_json(args.output, {**outcome, "questions": answered})
    print(json.dumps(summary(answered, strategies), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
