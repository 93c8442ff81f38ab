"""Next-token agreement with full attention: every strategy is fed full attention's own greedy answer, token by token.

python -m benchmark.next_token --context_len 8192 --strategies full,attention_aware_graph,wave_index --output FILE.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cache_hub import KV_Cache
from config import RetroInferConfig, add_config_args, config_from_args
from model_hub import LLM, load_model, load_tokenizer

from .command import exit_status
from .launcher import default_device
from .models import SHORT_NAMES, full_name
from .needle import TEXT
from .results import check_writable, environment, write_json
from .shared_builds import PrefilledCaches, shared_builds

_REQUEST = "Tell in your own words, in many sentences, what happens in this part of the book."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.next_token", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--model_name", "--model", default="smollm2-135m", help=f"{', '.join(SHORT_NAMES)}, hub name, folder or .gguf")
    add("--lora", help="PEFT LoRA folder to merge; 'none' keeps the default model without its adapter")
    add("--context_len", type=int, default=8192, help="tokens of prompt and answer together")
    add("--tokens", type=int, default=256, help="of each answer")
    add("--prompts", type=int, default=4, help="parts of the book, evenly spaced")
    add("--strategies", default="full,attention_aware_graph", help="comma list, variants as flat+none too")
    add("--device", default=default_device(), help="cpu, cuda:N, or auto: all GPUs")
    add("--dtype", default="bf16" if gpu else "fp32", choices=["fp16", "bf16", "fp32"])
    add("--output", type=Path, required=True)
    add_config_args(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Measures what the flags ask for, writes the file and returns a table."""
    if not 1 <= args.tokens < args.context_len:
        raise ValueError(f"tokens: got {args.tokens}, allowed: 1 to {args.context_len - 1} (context_len - 1)")
    if args.prompts < 1:
        raise ValueError(f"prompts: got {args.prompts}, allowed: >= 1")
    args.model_name = full_name(args.model_name)
    attn_config = config_from_args(args, args.model_name, args.context_len)
    settings = RetroInferConfig(**attn_config["RetroInfer"])
    names = list(dict.fromkeys(["full", *args.strategies.split(",")]))
    shared_builds(names, settings)
    check_writable(args.output)
    config = {key: value for key, value in vars(args).items() if key != "output"}
    where = environment()
    tokenizer = load_tokenizer(args.model_name)
    llm = load_model(args.model_name, args.context_len, args.dtype, args.device, tokenizer, args.lora)
    llm.progress = False
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in tqdm(range(args.prompts), unit="prompt", disable=None):
        ids = prompt_ids(tokenizer, args.context_len - args.tokens, number / args.prompts)
        for name, row in compare(llm, ids, names, settings, args.tokens).items():
            rows[name].append(row)
    means = {
        name: {key: sum(row[key] for row in of_prompts) / len(of_prompts) for key in of_prompts[0]}
        for name, of_prompts in rows.items()
    }
    results = {"config": {**config, **attn_config}, "environment": where, "summary": means, "prompts": rows}
    write_json(args.output, results)
    return table(means)


def prompt_ids(tokenizer: Any, tokens: int, start: float) -> Tensor:
    """The longest request [1, <= tokens] about the book's part that begins at `start` (0 to 1, round the end)."""
    words = TEXT.read_text(encoding="utf-8").split()
    at = int(start * len(words))
    words = (words[at:] + words[:at]) * (1 + tokens // len(words))

    def ids(count: int) -> Tensor:
        text = f"{' '.join(words[:count])}\n\n{_REQUEST}"
        if getattr(tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])

    low, high = 0, tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ids(middle).shape[1] <= tokens else (low, middle - 1)
    found = ids(low)
    if found.shape[1] > tokens:
        raise ValueError(f"context_len: got room for {tokens} tokens, which the request alone exceeds")
    return found


def compare(
    llm: LLM, ids: Tensor, names: list[str], settings: RetroInferConfig, tokens: int
) -> dict[str, dict[str, float]]:
    """For each strategy of `names`, "full" the first: the share of `tokens` next tokens that are full attention's, the
    mean KL divergence of its next-token distributions from full attention's in nats, and its costs."""
    rows, forced, expected = {}, torch.empty(0), torch.empty(0)
    caches = PrefilledCaches(llm, ids, names, settings, tokens)
    for name, cache in caches:
        if name == "full":
            forced, expected = greedy(llm, cache, caches.logits, tokens)
        found = fed(llm, cache, caches.logits, forced) if name != "full" else expected
        divergence = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
        stats = cache.stats
        rows[name] = {
            "agreement": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
            "kl_nats": float(divergence.mean()),
            "attended_share": stats.attended_share,
            "estimated_share": stats.estimated_share,
            "scored_share": stats.scored_share,
            "index_share": cache.index_bytes / cache.kv_bytes,
        }
    return rows


def greedy(llm: LLM, cache: KV_Cache, logits: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The greedy answer [tokens] and the log-probabilities [tokens, V] that it was chosen by."""
    chosen: list[Tensor] = []
    seen: list[Tensor] = []
    while len(chosen) < tokens:
        if chosen:
            logits = llm.decode_step(chosen[-1], cache)
        seen.append(logits[0].log_softmax(-1))
        chosen.append(logits.argmax(-1))
    return torch.cat(chosen), torch.stack(seen)


def fed(llm: LLM, cache: KV_Cache, logits: Tensor, forced: Tensor) -> Tensor:
    """The log-probabilities [tokens, V] before each of the forced tokens [tokens]."""
    seen = [logits[0].log_softmax(-1)]
    for token in forced[:-1]:
        seen.append(llm.decode_step(token[None], cache)[0].log_softmax(-1))
    return torch.stack(seen)


def table(means: dict[str, dict[str, float]]) -> str:
    """Markdown: a row a strategy."""
    lines = [
        "| strategy | next token agrees | KL, nats | tokens attended | clusters | keys scored | index / KV |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in means.items():
        shares = " | ".join(f"{100 * row[key]:.1f} %" for key in ("attended_share", "estimated_share", "scored_share"))
        agreement, index = f"{100 * row['agreement']:.1f} %", f"{100 * row['index_share']:.0f} %"
        lines.append(f"| {name} | {agreement} | {row['kl_nats']:.4f} | {shares} | {index} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    return exit_status("benchmark.next_token", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
