"""What eviction leaves of the attention: python -m benchmark.eviction --traces FOLDER.. --output FILE.json

For every kv head of real traces, the tokens that each method keeps of the prompt, and of the queries of the tokens
generated behind it: the share of their softmax mass that the kept tokens have, and the relative L2 error of the output
against full attention, float64. Beside the methods stand two bounds: `best set`, the tokens that these queries
themselves attend to most, chosen once for the group, and `top per query`, the exact best tokens of each query, which is
what retrieval does at that number of tokens. Means over queries and heads, with paired 95 % bootstrap intervals of the
differences from --against over (trace, layer, kv head). A row is written when it is done; a second call goes on.
pyramidkv is not here: its budgets need all layers. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cache_hub import STRATEGIES, EvictionCache
from cache_hub.eviction.importance import select_top_k_tokens
from cache_hub.eviction.scorer import Scorer
from config import ConfigError, RetroInferConfig, with_estimation

from .command import exit_status
from .index.layers import parse_layers
from .index.reference import exact_attention, relative_errors
from .index.results import ResultsFile
from .index.traces import LayerTrace, TraceFolder, open_folder
from .report.bootstrap import interval, resampled_means
from .report.text import number
from .results import environment

BEST_SET, PER_QUERY = "best set", "top per query"
STRATEGIES_SHOWN = (
    "streaming_llm,h2o,snapkv,circuitkv+direct,circuitkv+query,circuitkv+null_query,circuitkv+hub,circuitkv+null_hub,"
    "circuitkv+window,circuitkv+null_window,circuitkv+rank_max"
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.eviction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--traces", nargs="+", type=Path, required=True, help="folders of benchmark.index.extract")
    add("--layers", help="such as 6,13,20-22; default: all that a trace has")
    add("--strategies", default=STRATEGIES_SHOWN, help=f"comma list (default: {STRATEGIES_SHOWN})")
    add("--budgets", default="128,256,512,1024,2048", help="comma list of tokens (default: 128,256,512,1024,2048)")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of eviction or circuitkv")
    add("--against", default="snapkv", help="whose row the differences are from (default: snapkv)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where scores are made")
    add("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_status("benchmark.eviction", lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> str:
    """Does what the flags say and returns the tables; ValueError or OSError for bad input, before any work."""
    budgets = budgets_of(args.budgets)
    settings = settings_of(args.set)
    names = list(dict.fromkeys(args.strategies.split(",")))
    scorers = {name: scorer_of(name, settings, min(budgets)) for name in names}
    layers = None if args.layers is None else parse_layers(args.layers)
    folders = [open_folder(path, layers) for path in args.traces]
    for folder in folders:
        if folder.tokens <= max(budgets):
            raise ValueError(
                f"budgets: got {max(budgets)}, allowed: less than the {folder.tokens} tokens of {folder.path}"
            )
    protocol = {
        "budgets": budgets,
        "layers": args.layers,
        "eviction": settings.model_dump(include={"eviction", "circuitkv"}),
    }
    output = ResultsFile(args.output, protocol)
    where = environment()
    rows = [(folder, name) for folder in folders for name in (*names, BEST_SET, PER_QUERY)]
    wanted = [(folder, name) for folder, name in rows if _key(folder, name, scorers) not in output]
    with tqdm(total=sum(len(folder.files) for folder, _ in wanted), unit="layer", disable=None) as bar:
        for folder, name in wanted:
            measured: dict[str, Any] = {"seconds": 0.0, "layers": [], "mass": [], "error": []}
            for layer in folder.files:
                trace = folder.load(layer)
                began = time.perf_counter()
                scores = _scores(trace, scorers.get(name), name, torch.device(args.device))
                measured["seconds"] += time.perf_counter() - began
                mass, error = zip(
                    *(_kept(trace, name, scores, scorers.get(name), budget) for budget in budgets), strict=True
                )
                measured["layers"].append(layer)
                measured["mass"].append(torch.stack(mass).tolist())
                measured["error"].append(torch.stack(error).tolist())
                bar.update()
            about = {"key": _key(folder, name, scorers), "name": name, "trace": folder.name, "digest": folder.digest}
            output.add({**about, "tokens": folder.tokens, **measured, "environment": where})
    keys = {_key(folder, name, scorers) for folder, name in rows}
    return to_markdown([row for row in output.rows if row["key"] in keys], budgets, args.against)


def to_markdown(rows: list[dict[str, Any]], budgets: list[int], against: str) -> str:
    """A table of masses and one of errors for rows of a results file, one line a method, a column a budget."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = []
    for what, digits in (("mass", 3), ("error", 3)):
        lines += ["", f"| {what} | {' | '.join(map(str, budgets))} |", "|---" * (len(budgets) + 1) + "|"]
        # [heads of all traces and layers, budgets]
        tables = {
            name: np.concatenate(
                [
                    np.swapaxes(np.array(row[what]), 1, 2).reshape(-1, len(budgets))
                    for row in rows
                    if row["name"] == name
                ]
            )
            for name in names
        }
        for name in names:
            cells = [number(mean, digits) for mean in tables[name].mean(0)]
            if against in tables and name != against:
                apart = tables[name] - tables[against]
                drawn = resampled_means(apart, what)
                for at, mean in enumerate(apart.mean(0)):
                    found = interval(float(mean), drawn[:, at])
                    cells[at] += f" ({found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}])"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


def _scores(trace: LayerTrace, scorer: Scorer | None, name: str, device: torch.device) -> Tensor:
    """[Hkv, n], or [Hkv, g, t, n] for each query's own."""
    if scorer is None:
        weights = test_weights(trace)
        return weights if name == PER_QUERY else weights.mean((1, 2))
    queries, keys = prompt_states(trace)
    return scorer.score(queries.to(device), keys.to(device))[0].cpu()


def _kept(trace: LayerTrace, name: str, scores: Tensor, scorer: Scorer | None, budget: int) -> tuple[Tensor, Tensor]:
    """Mass and error [Hkv] of the test queries, means over queries and the group."""
    weights = test_weights(trace)
    ends = (0, 0) if scorer is None else (scorer.sinks, scorer.window)
    if name == PER_QUERY:
        kept = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, scores.topk(budget).indices, True)
    else:
        ids = select_top_k_tokens(scores[None], budget, *ends)[0]
        kept = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, ids, True)[:, None, None]
    left = weights * kept
    outputs = (left / left.sum(-1, keepdim=True)) @ trace.values.double()[:, None]
    return left.sum(-1).mean((1, 2)), relative_errors(outputs, exact_attention(trace)).mean((1, 2))


def test_weights(trace: LayerTrace) -> Tensor:
    """Attention [Hkv, g, t, n] float64 of the test queries to the prompt."""
    logits = trace.tests.double() @ trace.keys.double().transpose(1, 2)[:, None]
    return (logits / trace.keys.shape[2] ** 0.5).softmax(-1)


def prompt_states(trace: LayerTrace) -> tuple[Tensor, Tensor]:
    """Queries [1, n, H, D] and keys [1, n, Hkv, D] of a prompt, float32, as a Scorer takes them."""
    return trace.queries.float().flatten(0, 1).transpose(0, 1)[None], trace.keys.float().transpose(0, 1)[None]


def scorer_of(name: str, settings: RetroInferConfig, least: int) -> Scorer:
    """Of a method that ranks one layer's tokens; ConfigError for others, ValueError for a budget `least` too small."""
    strategy, chosen = with_estimation(name, settings)
    cache = STRATEGIES.get(strategy)
    if cache is None or not issubclass(cache, EvictionCache) or strategy == "pyramidkv" or "@" in name:
        raise ConfigError(
            f"strategies: got {name!r}, allowed: streaming_llm, h2o, snapkv, circuitkv, circuitkv+<score>"
        )
    scorer: Scorer = cache.options(chosen)["scorer"]
    if least <= scorer.sinks + scorer.window:
        raise ValueError(
            f"budgets: got {least}, allowed: more than {scorer.sinks + scorer.window}, what is always kept"
        )
    return scorer


def settings_of(given: list[str]) -> RetroInferConfig:
    """Those of --set; ValueError or ConfigError for others than of eviction and circuitkv."""
    sections: dict[str, Any] = {"eviction": {}, "circuitkv": {}}
    for text in given:
        key, _, value = text.partition("=")
        section, _, name = key.partition(".")
        if section not in sections or not name:
            raise ValueError(f"set: got {text!r}, allowed: eviction.KEY=VALUE, circuitkv.KEY=VALUE")
        sections[section][name] = json.loads(value) if value[:1] in "-0123456789" else value
    return RetroInferConfig(**sections)


def budgets_of(text: str) -> list[int]:
    """A comma list of numbers above 0, ascending; ValueError for anything else."""
    numbers = [int(word) for word in text.split(",") if word.strip().isdigit()]
    if len(numbers) != text.count(",") + 1 or min(numbers) < 1:
        raise ValueError(f"budgets: got {text!r}, allowed: a comma list of numbers >= 1")
    return sorted(set(numbers))


def _key(folder: TraceFolder, name: str, scorers: dict[str, Scorer]) -> str:
    return hashlib.sha256(repr((folder.digest, list(folder.files), name, scorers.get(name))).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
