"""Times what scoring a prompt costs beside its prefill: python -m benchmark.eviction_time --output FILE.json

One layer of a model's shape with random weights and random hidden states: its prefill (projections, attention, MLP),
its attention alone, and the scores of every method as eviction makes them, in the default configuration but for the
score and rows that a name states. Beside the methods: `log-sum-exp`, one pass over all rows; `solve`, the exact walk
with the log-sum-exp at hand, as an attention that returns it would leave it; and `torch`, the exact walk without
kernels. Every time stands as a share of the layer's prefill and as a multiple of its attention; memory is the highest
beside weights and states. A product of large matrices tells what the machine does: at its rate, an exact walk with its
log-sum-exp (2 n^2 D multiply-adds a head, of which causality leaves half) takes the `roofline`. Rows are written as
they are finished; a call with the same settings goes on behind. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from attn_hub import full_prefill_attn
from cache_hub import STRATEGIES, EvictionCache
from cache_hub.eviction.blocked import blocked_chain_scores, causal_log_sum_exp
from cache_hub.eviction.scorer import Scorer
from config import ConfigError, RetroInferConfig, with_estimation
from model_hub.layers import DecoderLayer

from .command import exit_status
from .decode.bandwidth import synchronize
from .decode.dense import DenseSizes, around, random_weights
from .decode.extended import Shape
from .index.results import ResultsFile
from .results import environment

LAYER, ATTENTION, LOG_SUMS, SOLVE, TORCH = "layer", "attention", "log-sum-exp", "solve", "torch"
WINDOW = "/window"
METHODS = (
    "streaming_llm,snapkv,h2o,circuitkv+direct,circuitkv+query/window,circuitkv+hub/window,circuitkv+query,"
    "circuitkv+null_query,circuitkv+rank_max"
)
# A matrix product of this many rows and columns is what a GPU does best; on a CPU a smaller one tells as much.
_PRODUCT = {"cuda": 8192, "cpu": 512}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.eviction_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", default="32,32,8,128", help="layers,heads,kv_heads,head_dim (default: 32,32,8,128, Llama-3.1-8B's)")
    add("--dense", default="4096,14336", help="width of model and MLP (default: 4096,14336)")
    add("--lengths", default="8192,16384,32768", help="comma list of tokens (default: 8192,16384,32768)")
    add("--methods", default=METHODS, help=f"comma list, behind circuitkv's score /window for its rows ({METHODS})")
    add("--rounds", type=int, default=5)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_status("benchmark.eviction_time", lambda: run(parse_args(argv)))


@torch.inference_mode()
def run(args: argparse.Namespace) -> str:
    """Does what the flags say and returns the table; ValueError or OSError for bad input, before any work."""
    shape = Shape.parse(args.shape)
    widths, lengths = (_numbers(name, getattr(args, name)) for name in ("dense", "lengths"))
    if len(widths) != 2:
        raise ValueError(f"dense: got {args.dense!r}, allowed: width of the model, width of its MLP")
    if args.rounds < 1:
        raise ValueError(f"rounds: got {args.rounds}, allowed: >= 1")
    scorers = {name: scorer_of(name) for name in dict.fromkeys(args.methods.split(","))}
    least = max(scorer.sinks + scorer.window for scorer in scorers.values())
    if min(lengths) <= least:
        raise ValueError(f"lengths: got {min(lengths)}, allowed: more than {least}, what is always kept")
    protocol = {name: getattr(args, name) for name in ("shape", "dense", "methods", "rounds", "device")}
    output = ResultsFile(args.output, protocol)
    wanted = [length for length in lengths if str(length) not in output]
    for length in tqdm(wanted, unit="length", disable=None):
        measured = measure(shape, DenseSizes(widths[0], widths[1], 1), length, scorers, args)
        output.add({"key": str(length), "tokens": length, **measured, "environment": environment()})
    return table([row for row in output.rows if row["tokens"] in lengths])


def measure(
    shape: Shape, sizes: DenseSizes, length: int, scorers: dict[str, Scorer], args: argparse.Namespace
) -> dict[str, Any]:
    """ms of every round, and bytes, by what was timed; TFLOP/s of the matrix product."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    layer = DecoderLayer(*next(random_weights(shape, sizes, 1, args.device, dtype)))
    llm = around([layer], sizes)
    cos, sin = llm.cos_sin(torch.arange(length, device=device)[None])
    hidden = torch.randn(1, length, sizes.hidden, device=device, dtype=dtype)
    query, key, value = layer.project_prompt(hidden, cos, sin, llm.mlp_chunk)
    heads_first = query.transpose(1, 2), key.transpose(1, 2)
    lse = causal_log_sum_exp(*heads_first)

    def prefill() -> None:
        states = layer.project_prompt(hidden, cos, sin, llm.mlp_chunk)
        layer.finish(hidden.clone(), full_prefill_attn(*states), llm.mlp_chunk)

    works: dict[str, Callable[[], object]] = {
        LAYER: prefill,
        ATTENTION: partial(full_prefill_attn, query, key, value),
        LOG_SUMS: partial(causal_log_sum_exp, *heads_first),
        SOLVE: partial(blocked_chain_scores, *heads_first, lse),
        TORCH: partial(blocked_chain_scores, *heads_first, backend="torch"),
        **{name: partial(scorer.score, query, key) for name, scorer in scorers.items()},
    }
    measured = {name: _timed(work, args.rounds, device) for name, work in works.items()}
    side = _PRODUCT[device.type]
    square = torch.randn(side, side, device=device, dtype=dtype)
    product = median(_timed(lambda: square @ square, args.rounds, device)[0])
    rate = 2 * side**3 / product  # a ms
    return {
        "ms": {name: times for name, (times, _) in measured.items()},
        "bytes": {name: peak for name, (_, peak) in measured.items()},
        "product_tflops": rate / 1e9,
        "roofline_ms": 2 * length**2 * shape.head_dim * shape.heads / rate,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = []
    for row in rows:
        lines += ["", f"| {row['tokens']} tokens | ms | of the layer's prefill | of its attention | MiB |"]
        lines += ["|---" * 5 + "|"]
        ms = {name: median(times) for name, times in row["ms"].items()}
        ms["roofline"] = row["roofline_ms"]
        for name, time in ms.items():
            lines.append(
                f"| {name} | {time:.2f} | {100 * time / ms[LAYER]:.1f} % | {time / ms[ATTENTION]:.2f} | "
                + (f"{row['bytes'][name] / 2**20:.0f} |" if name in row["bytes"] else "|")
            )
    return "\n".join(lines[1:])


def scorer_of(name: str) -> Scorer:
    """Of a method, which may name its score and rows, circuitkv+hub/window; ConfigError for others."""
    plain, slash, rows = name.partition("/")
    if slash and (rows != "window" or not plain.startswith("circuitkv")):
        raise ConfigError(f"methods: got {name!r}, allowed behind circuitkv: {WINDOW}")
    rows_of = {"circuitkv": {"rows": "window" if slash else "exact"}}
    strategy, settings = with_estimation(plain, RetroInferConfig.model_validate(rows_of))
    cache = STRATEGIES.get(strategy)
    if cache is None or not issubclass(cache, EvictionCache):
        raise ConfigError(f"methods: got {name!r}, allowed: strategies that evict, circuitkv+<score>[{WINDOW}]")
    scorer: Scorer = cache.options(settings)["scorer"]
    return scorer


def _timed(work: Callable[[], object], rounds: int, device: torch.device) -> tuple[list[float], int]:
    """ms of each round, behind one that is not timed, and the most bytes that CUDA held at a time beside those before;
    0 on a CPU."""
    held = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    work()
    peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else 0
    times = []
    for _ in range(rounds):
        synchronize(str(device))
        begin = perf_counter()
        work()
        synchronize(str(device))
        times.append(1e3 * (perf_counter() - begin))
    return times, peak


def _numbers(name: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{name}: got {text!r}, allowed: a comma list of whole numbers above 0")
    return sorted(int(word) for word in words) if name == "lengths" else [int(word) for word in words]


if __name__ == "__main__":
    sys.exit(main())
