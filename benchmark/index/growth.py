"""Grows an index by tokens that come later: python -m benchmark.index.growth --traces FOLDER.. --output FILE.json

The first --prompt tokens of a trace stand for a prompt, whose index is built; the next --generated ones enter it in
batches, as in decoding: a batch has left the window, and its queries are those of the latest positions. Then the
queries of the next --tests positions are asked, of the grown index and of one built over all those tokens at once.
"grown without queries": the batches entered without theirs. "seconds" are of the build, or of the slowest batch;
compare them in one file only. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cache_hub.index import INDEXES, TokenIndex, make_index
from cache_hub.index.knn import exact_topk

from ..command import exit_status
from ..results import check_writable, environment, write_json
from .exact_head import SINKS, WINDOW
from .layers import parse_layers
from .search_time import DTYPES, search_all
from .traces import LayerTrace, TraceFolder, open_folder


def build(args: argparse.Namespace, keys: Tensor, queries: Tensor) -> TokenIndex:
    """An index of keys [R, N, D], those behind the sinks, with the queries [R, g, M, D] of the positions from 0 on."""
    index = make_index(args.strategy, num_threads=args.threads)
    index.build(keys, queries, torch.arange(queries.shape[2]) - SINKS)
    return index


def grow(args: argparse.Namespace, keys: Tensor, queries: Tensor, with_queries: bool) -> tuple[TokenIndex, list[float]]:
    """An index built over the prompt alone, to which the other keys were added, and the seconds of each batch."""
    first = args.prompt - SINKS - WINDOW
    index, seconds = build(args, keys[:, :first], queries[:, :, : args.prompt]), []
    for at in range(0, args.generated, args.batch):
        batch = torch.arange(args.prompt + at, min(args.prompt + at + args.batch, args.prompt + args.generated))
        asked = (queries[:, :, batch], batch - SINKS) if with_queries else (None, None)
        begin = perf_counter()
        index.insert(keys[:, : first + at + len(batch)], *asked)
        seconds.append(perf_counter() - begin)
    return index, seconds


def measure(folder: TraceFolder, layer: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way to have the index: recall (mean and worst query head), keys scored, seconds."""
    trace: LayerTrace = folder.load(layer)
    tokens = args.prompt + args.generated
    store = trace.keys[:, SINKS : tokens - WINDOW].to(DTYPES[args.dtype]).contiguous()
    queries = trace.queries[:, :, : tokens + args.tests].float()
    tests = queries[:, :, tokens:]
    exact = torch.stack([exact_topk(store, tests[:, :, step], args.top_k)[1] for step in range(args.tests)])

    begin = perf_counter()
    fresh = build(args, store, queries[:, :, :tokens])
    built = perf_counter() - begin
    grown, seconds = grow(args, store, queries, with_queries=True)
    without, seconds_without = grow(args, store, queries, with_queries=False)
    rows = []
    for name, index, took in (
        ("built at once", fresh, built),
        ("grown", grown, max(seconds)),
        ("grown without queries", without, max(seconds_without)),
    ):
        _, scored, ids = search_all(index, tests, args.top_k)
        hits = (exact[..., None] == ids[..., None, :]).any(-1).float().mean((0, 3))
        rows.append(
            {
                "trace": folder.name,
                "layer": layer,
                "index": name,
                "recall": hits.mean().item(),
                "worst_head": hits.min().item(),
                "keys_scored": scored / exact[..., 0].numel(),
                "seconds": took,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, and their means behind them."""
    lines = [
        "| trace | layer | index | recall | worst head | keys scored | seconds |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    figures = ("recall", "worst_head", "keys_scored", "seconds")
    means = [
        {"trace": "mean", "layer": "all", "index": name}
        | {key: sum(row[key] for row in some) / len(some) for key in figures}
        for name in dict.fromkeys(row["index"] for row in rows)
        if (some := [row for row in rows if row["index"] == name])
    ]
    for row in rows + means:
        lines.append(
            f"| {row['trace']} | {row['layer']} | {row['index']} | {row['recall']:.4f} | {row['worst_head']:.3f} | "
            f"{row['keys_scored']:.0f} | {row['seconds']:.2f} |"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--traces", nargs="+", type=Path, required=True, help="folders of benchmark.index.extract")
    add("--layers", help="such as 6,13,20-22; default: all of the traces")
    add("--strategy", choices=INDEXES, default="attention_aware_graph")
    add("--prompt", type=int, default=8192, help="tokens that the index is built over, sinks and window among them")
    add("--generated", type=int, default=8192, help="tokens that enter it")
    add("--batch", type=int, default=512, help="tokens that enter it at a time")
    add("--tests", type=int, default=64, help="positions behind these whose queries are asked")
    add("--top_k", type=int, default=100)
    add("--dtype", choices=DTYPES, default="bf16", help="of the keys")
    add("--threads", type=int, default=1, help="of build, growth and search")
    add("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


@torch.inference_mode()
def run(args: argparse.Namespace) -> str:
    """Checks everything, measures, writes the file and returns the table."""
    for name in ("generated", "batch", "tests", "top_k", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, allowed: >= 1")
    if args.prompt <= SINKS + WINDOW:
        raise ValueError(f"prompt: got {args.prompt}, allowed: more than {SINKS + WINDOW}")
    check_writable(args.output)
    folders = [open_folder(path, None if args.layers is None else parse_layers(args.layers)) for path in args.traces]
    needed = args.prompt + args.generated + args.tests
    for folder in folders:
        if folder.tokens < needed:
            raise ValueError(f"traces: {folder.path} has {folder.tokens} tokens, allowed: at least {needed}")
    torch.set_num_threads(args.threads)
    layers = [(folder, layer) for folder in folders for layer in folder.files]
    rows = [row for folder, layer in tqdm(layers, unit="layer", disable=None) for row in measure(folder, layer, args)]
    names = ("strategy", "prompt", "generated", "batch", "tests", "top_k", "dtype", "threads")
    config = {name: getattr(args, name) for name in names}
    write_json(args.output, {"config": config, "environment": environment(), "rows": rows})
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.index.growth", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
