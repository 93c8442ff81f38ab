"""Compares estimates of the tail under exact selection: python -m benchmark.index.variants --traces FOLDER.. --output F

No index, no cache: of every kv head all logits are computed, and each variant replaces some of them (estimates.py says
what they are). Relative L2 error of the output per query head against full attention in float64, over the queries of
generated tokens; tokens and clusters read per kv head and query. Static: the first 4 tokens and the last 64. Prints a
Markdown table for each trace. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cache_hub.tail import TOKENS_PER_CLUSTER

from ..command import exit_status
from ..results import check_writable, environment, write_json
from . import estimates
from .exact_head import (
    ESTIMATION_BUDGET,
    LEAST_INDEXED,
    RETRIEVAL_BUDGET,
    SINKS,
    WINDOW,
    ClusterRule,
    ExactHead,
    Outcome,
)
from .layers import parse_layers
from .reference import exact_attention, relative_errors
from .traces import LayerTrace, TraceFolder, open_folder

WAVE = ClusterRule("wave")
TAIL = ClusterRule("metric", TOKENS_PER_CLUSTER, 512)
OTHER_RULES = (
    ClusterRule("metric", 16, 512),
    ClusterRule("metric", 8, 512),
    ClusterRule("metric", TOKENS_PER_CLUSTER, 64),
    ClusterRule("metric", TOKENS_PER_CLUSTER),
    ClusterRule("euclidean", TOKENS_PER_CLUSTER),
    ClusterRule("euclidean", 16),
)
SHARES = (0.1, 0.232, 0.5, 1.0)
# Counts to compare at equal bytes: without a tail, with all of its clusters, with some of them.
WITHOUT_TAIL, WITH_TAIL, WITH_SOME = (200, 400, 800, 1600), (16, 32, 64, 200, 400), (16, 32, 64)
NEAR_SHARES = (0.02, 0.1, 0.3, 1.0)
BOUNDS, MOST_TOKENS = (0.1, 0.05, 0.02), 400
SAMPLES, SEED = 4, 0

Variant = Callable[[ExactHead], Outcome]


def variants(top_k: list[int]) -> dict[str, Variant]:
    """All variants by name, for each of top_k and those that do not depend on it."""
    rows: dict[str, Variant] = {}
    for k in top_k:
        rows[f"top {k} per head"] = partial(estimates.top, count=k, united=False)
        rows[f"top {k}"] = partial(estimates.top, count=k, united=True)
        for share in SHARES:
            for key, corrected in (("kept", False), ("corrected", True)):
                name = f"top {k} + {share:g} of {WAVE.name}, centroid {key}"
                rows[name] = partial(estimates.top_with_tail, count=k, rule=WAVE, share=share, corrected=corrected)
        for rule in (TAIL, *OTHER_RULES):
            rows[f"top {k} + {rule.name}"] = partial(estimates.top_with_tail, count=k, rule=rule)
        rows[f"top {k} + {TAIL.name}, bfloat16"] = partial(estimates.top_with_tail, count=k, rule=TAIL, rounded=True)
        rows[f"top {k} + {TAIL.name}, centroid corrected"] = partial(
            estimates.top_with_tail, count=k, rule=TAIL, corrected=True
        )
        for sample in ("own u", "own", "union"):
            rows[f"lift, {k} draws, {sample}"] = partial(estimates.lift, draws=k, sample=sample)
        for near in NEAR_SHARES:
            rows[f"top {k // 2}, {k - k // 2} draws in the nearest {near:g} of {TAIL.name}, centroids beyond"] = (
                partial(estimates.near_lift_far_centroids, count=k, rule=TAIL, near_share=near)
            )
    for k in WITHOUT_TAIL:
        rows[f"top {k}"] = partial(estimates.top, count=k, united=True)
    for k in WITH_TAIL:
        rows[f"top {k} + {TAIL.name}"] = partial(estimates.top_with_tail, count=k, rule=TAIL)
    for k in sorted({*WITH_SOME, *top_k}):
        for share in SHARES[:-1]:
            rows[f"top {k} + {share:g} of {TAIL.name}"] = partial(
                estimates.top_with_tail, count=k, rule=TAIL, share=share
            )
    for bound in BOUNDS:
        for key, tail in (("", False), (f" + {TAIL.name}", True)):
            name = f"until {bound:g} is missing, at most {MOST_TOKENS}{key}"
            rows[name] = partial(estimates.adaptive, bound=bound, most=MOST_TOKENS, rule=TAIL, tail=tail)
    rows["wave index"] = partial(estimates.wave, retrieval_budget=RETRIEVAL_BUDGET, estimation_budget=ESTIMATION_BUDGET)
    return rows


def measure(folder: TraceFolder, chosen: dict[str, Variant]) -> list[dict[str, Any]]:
    """A row for every variant: see _row."""
    errors: dict[str, list[Tensor]] = {name: [] for name in chosen}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in chosen}
    shape = (folder.tokens, *(len(x) for x in (folder.files, folder.files[next(iter(folder.files))])))
    with tqdm(total=shape[1] * shape[2] * len(chosen), unit="row", desc=folder.name, disable=None) as bar:
        for layer in folder.files:
            trace = folder.load(layer)
            exact, draws = exact_attention(trace), uniform_logs(trace)
            for kv_head in range(len(trace.keys)):
                head = ExactHead(trace, kv_head, draws[:, kv_head])
                for name, variant in chosen.items():
                    outcome = variant(head)
                    repeats = outcome.outputs.shape[1] // exact.shape[2]
                    errors[name].append(relative_errors(outcome.outputs, exact[kv_head].repeat(1, repeats, 1)))
                    outcomes[name].append(outcome)
                    bar.update()
    return [_row(name, torch.stack(errors[name]), outcomes[name], list(folder.files)) for name in chosen]


def uniform_logs(trace: LayerTrace) -> Tensor:
    """log u [SAMPLES, Hkv, g, N] of a layer, u in (0, 1], the same in every call."""
    kv_heads, group, length, _ = trace.queries.shape
    shape = (SAMPLES, kv_heads, group, length - SINKS - WINDOW)
    return (1 - torch.rand(shape, generator=torch.Generator().manual_seed(SEED))).log()


def _row(name: str, errors: Tensor, outcomes: list[Outcome], layers: list[int]) -> dict[str, Any]:
    """errors [layers * Hkv, g, T]. Median, mean and p90 over layers, query heads and queries; worst_head: the largest
    of the query heads' means, by_head [layers][H]; tokens (static ones included) and clusters: means."""
    by_head = errors.mean(2).view(len(layers), -1)
    layer, worst = divmod(int(by_head.argmax()), by_head.shape[1])
    average = lambda values: _rounded(sum(values) / len(outcomes))  # noqa: E731
    tokens, clusters = (average([getattr(o, part) for o in outcomes]) for part in ("tokens", "clusters"))
    return {
        "name": name,
        "output_error": {
            "median": _rounded(errors.quantile(0.5)),
            "mean": _rounded(errors.mean()),
            "p90": _rounded(errors.quantile(0.9)),
            "worst_head": _rounded(by_head[layer, worst]),
            "worst_head_at": {"layer": layers[layer], "query_head": worst},
            "by_head": [[_rounded(value) for value in heads] for heads in by_head],
        },
        "tokens": tokens,
        "clusters": clusters,
        "rows_read": _rounded(tokens + clusters),
        "notes": {key: average([o.notes[key] for o in outcomes]) for key in outcomes[0].notes},
    }


def table(record: dict[str, Any]) -> str:
    """A trace's rows in Markdown."""
    lines = [
        f"### {record['trace']}: {record['tokens']} tokens, layers {', '.join(map(str, record['layers']))}, "
        f"{record['queries']} queries",
        "| variant | median | mean | p90 | worst head | tokens | clusters | rows read | notes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        errors = " | ".join(f"{row['output_error'][key]:.4f}" for key in ("median", "mean", "p90", "worst_head"))
        read = " | ".join(f"{row[key]:.0f}" for key in ("tokens", "clusters", "rows_read"))
        notes = ", ".join(f"{key} {value:.3g}" for key, value in row["notes"].items())
        lines.append(f"| {row['name']} | {errors} | {read} | {notes} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index.variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--traces", nargs="+", type=Path, required=True, help="folders of benchmark.index.extract")
    add("--layers", help="such as 6,13,20-22; default: all of the traces")
    add("--top_k", default="32,100", help="tokens a query head retrieves or draws, comma list (default: 32,100)")
    add("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


def parse_counts(text: str) -> list[int]:
    """ "32,100" is [32, 100]. Raises ValueError for anything but different numbers of 2 or more."""
    words = [word.strip() for word in text.split(",")]
    counts = [int(word) for word in words if word.isdecimal() and int(word) >= 2]
    if len(set(counts)) < len(words):
        raise ValueError(f"top_k: got {text!r}, allowed: different numbers >= 2, such as 32,100")
    return counts


@torch.inference_mode()
def run(args: argparse.Namespace) -> str:
    """Checks everything, measures, writes the file and returns the tables."""
    top_k = parse_counts(args.top_k)
    check_writable(args.output)
    layers = None if args.layers is None else parse_layers(args.layers)
    folders = [open_folder(path, layers) for path in args.traces]
    least = SINKS + WINDOW + LEAST_INDEXED
    for folder in folders:
        if folder.tokens < least:
            raise ValueError(f"traces: {folder.path} has {folder.tokens} tokens, allowed: at least {least}")
    if len({folder.digest for folder in folders}) < len(folders):
        raise ValueError("traces: the same trace is given twice, allowed: once")
    chosen, records, where = variants(top_k), [], environment()
    for folder in folders:
        queries = folder.load(next(iter(folder.files))).tests.shape[2]
        records.append(
            {
                "trace": folder.name,
                "digest": folder.digest,
                "protocol": folder.info.get("protocol", {}),
                "tokens": folder.tokens,
                "queries": queries,
                "layers": list(folder.files),
                "rows": measure(folder, chosen),
            }
        )
    config = {"top_k": top_k, "layers": layers or "all", "samples": SAMPLES, "seed": SEED, "static": [SINKS, WINDOW]}
    write_json(args.output, {"config": config, "environment": where, "traces": records})
    return "\n\n".join(table(record) for record in records)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.index.variants", lambda: run(args))


def _rounded(value: float | Tensor) -> float:
    return float(f"{float(value):.5g}")


if __name__ == "__main__":
    sys.exit(main())
