"""The main job: a model answers from a long prompt, with full attention and with a retrieval strategy side by side.

Without arguments: SmolLM2-135M-Instruct with its 64K adapter finds a needle in 4,096 tokens of real text, through full
attention and through the attention-aware graph.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from benchmark.document import asked_about, check_document_args, load_and_answer, save_and_answer
from benchmark.measure import measure
from benchmark.needle import needle_prompt
from benchmark.results import check_writable, environment, write_json
from config import ConfigError, RetroInferConfig, add_config_args, config_from_args, resolve_strategy
from model_hub import load_model, load_tokenizer

SEED = 2025


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--model_name", "--model", default="SmolLM2-135M-Instruct", help="hub name, folder or .gguf file"
    )
    parser.add_argument("--lora", help="PEFT LoRA folder to merge; 'none' keeps the default model without its adapter")
    parser.add_argument("--device", default="cuda:0" if gpu else "cpu", help="cpu, cuda:N, or auto: all GPUs")
    parser.add_argument("--dtype", default="bf16" if gpu else "fp32", choices=["fp16", "bf16", "fp32"])
    parser.add_argument("--context_len", type=int, default=4096, help="tokens of the needle prompt and its answer")
    parser.add_argument("--depth", type=float, default=0.5, help="where in the text the needle is, 0 to 1")
    parser.add_argument("--haystack", default="text", choices=["text", "noise"], help="what the needle is hidden in")
    parser.add_argument("--data_path", help='instead of the needle: a JSON list of {"input": .., "outputs": ..}')
    parser.add_argument("--batch_size", type=int, default=1, help="prompts are repeated to fill it")
    parser.add_argument("--prefill_bsz", type=int, default=1, help="sequences prefilled together")
    parser.add_argument("--prefill_method", default="full", choices=["full"])
    parser.add_argument("--gen_len", type=int, default=16, help="new tokens")
    parser.add_argument(
        "--do_sample", action="store_true", help="temperature .6, top_p .95, top_k 20, instead of greedy"
    )
    parser.add_argument(
        "--diagnose", action="store_true", help="compare every step with an exact scan: recall and mass"
    )
    parser.add_argument(
        "--save_prefix", metavar="FOLDER", help="read the document once, save it there, then answer; one strategy runs"
    )
    parser.add_argument(
        "--load_prefix", metavar="FOLDER", help="answer about the document saved there, which is not read again"
    )
    parser.add_argument("--question", help="in place of the needle's, about the document saved or loaded")
    parser.add_argument("--output", help="JSON file for the results")
    add_config_args(parser)
    return parser.parse_args(argv)


def read_prompts(path: str) -> tuple[list[str], list[str]]:
    """Prompts and the texts their answers must contain, from a JSON list of {"input", "outputs"} as RetroInfer's."""
    try:
        samples = json.loads(Path(path).read_text(encoding="utf-8"))
        outputs = [sample["outputs"] for sample in samples]
        expected = [output[0] if isinstance(output, list) else output for output in outputs]
        return [sample["input"] for sample in samples], [str(text) for text in expected]
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f'data_path: {path} is not a JSON list of {{"input": .., "outputs": ..}}: {error!r}') from None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs full attention and the chosen strategy; returns {"config", "environment", "results"}."""
    if args.batch_size < 1 or args.gen_len < 1 or args.context_len < 1:
        raise ValueError(
            f"batch_size, gen_len, context_len: got {args.batch_size}, {args.gen_len}, {args.context_len}; "
            "allowed: >= 1"
        )
    if args.output:
        check_writable(args.output)
    check_document_args(args)
    if args.load_prefix is not None:
        return load_and_answer(args, SEED)
    data = read_prompts(args.data_path) if args.data_path else None
    if data is None:
        config_from_args(args, args.model_name, args.context_len)  # fail before the tokenizer is fetched
    tokenizer = load_tokenizer(args.model_name)
    needle = None
    if data is None:
        needle = needle_prompt(tokenizer, args.context_len - args.gen_len, args.depth, args.haystack, SEED)
        data = [needle.text], [needle.answer]
    if args.save_prefix is not None:
        return save_and_answer(args, tokenizer, *asked_about(args, tokenizer, data, needle), SEED)
    prompts, expected = ((texts * args.batch_size)[: args.batch_size] for texts in data)
    special_tokens = args.data_path is not None
    lengths = [len(tokenizer(prompt, add_special_tokens=special_tokens).input_ids) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"data_path: got prompts of {lengths} tokens, allowed: at least one prompt, none empty")
    longest = max(lengths)
    attn_config = config_from_args(args, args.model_name, longest)
    settings = RetroInferConfig(**attn_config["RetroInfer"])
    strategy = resolve_strategy(args.attn_type, settings)
    llm = load_model(args.model_name, longest + args.gen_len, args.dtype, args.device, tokenizer, lora=args.lora)
    strategy, settings = llm.settle(strategy, settings, lengths, args.gen_len, args.prefill_bsz)
    attn_config = {"RetroInfer": settings.model_dump()}

    names = list(dict.fromkeys(("full", strategy)))
    for name in names:
        llm.check_memory([(name, settings)], lengths, args.gen_len, args.prefill_bsz)
    results = {}
    for name in names:
        torch.manual_seed(SEED)
        print(f"{name}: {len(prompts)} x {longest} tokens", file=sys.stderr)
        results[name] = measure(
            llm,
            tokenizer,
            prompts,
            expected,
            name,
            attn_config,
            special_tokens=special_tokens,
            max_new_length=args.gen_len,
            do_sample=args.do_sample,
            ignore_eos=False,
            prefill_bsz=args.prefill_bsz,
            diagnose=args.diagnose,
        )
    flags = {key: value for key, value in vars(args).items() if key != "output"}
    return {
        "config": {**flags, "expected": expected, **attn_config},
        "environment": environment(),
        "results": results,
    }


def report(results: dict[str, dict[str, Any]]) -> str:
    """The results of all strategies as one table."""

    def shares(result: dict[str, Any]) -> dict[str, str]:
        recall, build = result["recall"], result["build_seconds_by_stage"]
        rows = {
            "answer": json.dumps(result["answer"], ensure_ascii=False),
            "right": {True: "yes", False: "NO", None: "?"}[result["correct"]],
            **({"load": f"{result['load_seconds']:.2f} s"} if "load_seconds" in result else {}),
            "prefill": f"{result['prefill_seconds']:.2f} s",
            "build": f"{result['build_seconds']:.2f} s",
            **{f"  {stage}": f"{seconds:.2f} s" for stage, seconds in build.items()},
            "decode": f"{result['decode_seconds']:.2f} s",
            "per token": f"{result['ms_per_token']:.1f} ms",
            **{f"  {stage}": f"{ms:.1f} ms" for stage, ms in result["ms_by_stage"].items()},
            "tokens attended": f"{result['attended_share']:.1%} of the context",
            "keys scored": f"{result['scored_share']:.1%} of the context",
            "index / KV bytes": f"{result['index_bytes'] / 2**20:.1f} / {result['kv_bytes'] / 2**20:.1f} MiB "
            f"({result['index_bytes'] / result['kv_bytes']:.0%})",
        }
        if recall is not None:
            rows["recall of the exact top k"] = f"{recall:.3f} (worst head {result['recall_worst_head']:.3f})"
            rows["attention mass"] = f"{result['mass']:.4f}"
            worst = result["mass_of_exact_worst_head"]
            rows["  of the exact top k's"] = f"{result['mass_of_exact']:.4f} (worst head {worst:.4f})"
        return rows

    columns = {name: shares(result) for name, result in results.items()}
    names = list(dict.fromkeys(row for column in columns.values() for row in column))
    table = [["", *columns]] + [[row, *(column.get(row, "") for column in columns.values())] for row in names]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    notes = [f"{name}: {note}" for name, result in results.items() for note in result["notes"]]
    return "\n".join(lines + notes)


def main() -> int:
    args = parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cache_hub").setLevel(logging.INFO)
    try:
        outcome = run(args)
    except (ConfigError, ValueError, FileNotFoundError, OSError, RuntimeError) as error:
        print(f"simple_test.py: error: {error}", file=sys.stderr)
        return 2
    print(report(outcome["results"]))
    if args.output:
        try:
            write_json(args.output, outcome)
        except OSError as error:
            print(json.dumps(outcome, ensure_ascii=False))
            print(f"simple_test.py: error: {args.output} not written, results are above: {error}", file=sys.stderr)
            return 1
    return 1 if any(result["correct"] is False for result in outcome["results"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
