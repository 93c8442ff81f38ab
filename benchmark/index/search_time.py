"""Times the search alone: python -m benchmark.index.search_time --traces FOLDER.. --output FILE.json

Every index is built over a layer's keys, without sinks and window, and asked the recorded decode queries one step at a
time, each step told what the one before found, as in decoding. Indexes take turns, and the fastest round counts.
A nanosecond of an index is to be compared with another's in the same file only. hnsw is faiss's; hnswlib, where it is
installed, does not tell how many keys it scores. For more keys, or wider ones, than the traces have, --join_traces and
--join_heads make them of several: for times alone, as no model ever saw such a prompt. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cache_hub.index import INDEXES, SearchResult, TokenIndex, make_index
from cache_hub.index.knn import exact_topk

from ..command import exit_status
from ..results import check_writable, environment, write_json
from .exact_head import SINKS, WINDOW
from .hnswlib_index import HnswlibIndex, is_installed
from .joined import join_heads, join_traces
from .layers import parse_layers
from .traces import LayerTrace, TraceFolder, open_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


HNSWLIB = "hnswlib"


def build(strategy: str, trace: LayerTrace, dtype: torch.dtype, threads: int) -> TokenIndex | HnswlibIndex:
    """An index over the prompt's keys between sinks and window, of one layer."""
    index: TokenIndex | HnswlibIndex
    index = HnswlibIndex(threads) if strategy == HNSWLIB else make_index(strategy, num_threads=threads)
    keys = trace.keys[:, SINKS : trace.keys.shape[1] - WINDOW].to(dtype).contiguous()
    index.build(keys, trace.queries.float(), torch.arange(trace.queries.shape[2]) - SINKS)
    return index


def search_all(index: TokenIndex | HnswlibIndex, queries: Tensor, k: int) -> tuple[float, int, Tensor]:
    """Seconds for queries [R, g, T, D], one step after another, keys scored, and ids [T, R, g, k]."""
    found: list[SearchResult] = []
    begin = perf_counter()
    for step in range(queries.shape[2]):
        found.append(index.search(queries[:, :, step], k, found[-1].ids if found else None))
    seconds = perf_counter() - begin
    return seconds, sum(int(one.keys_scored.sum()) for one in found), torch.stack([one.ids for one in found])


def load(folders: Sequence[TraceFolder], layer: int, heads_joined: bool) -> LayerTrace:
    """One layer of a trace, or of several joined; ValueError as join_traces and join_heads."""
    traces = [folder.load(layer) for folder in folders]
    trace = join_traces(traces) if len(traces) > 1 else traces[0]
    return join_heads(trace) if heads_joined else trace


def measure(folders: Sequence[TraceFolder], layer: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every strategy: keys scored, recall, microseconds a query and nanoseconds a key."""
    trace, dtype = load(folders, layer, args.join_heads), DTYPES[args.dtype]
    indexes = {strategy: build(strategy, trace, dtype, args.threads) for strategy in args.strategies}
    queries = trace.tests.to(dtype).float()
    keys = trace.keys[:, SINKS : trace.keys.shape[1] - WINDOW].to(dtype)
    steps = range(queries.shape[2])
    exact = torch.stack([exact_topk(keys, queries[:, :, step], args.top_k)[1] for step in steps])
    asked = queries.shape[0] * queries.shape[1] * queries.shape[2]
    best = dict.fromkeys(indexes, float("inf"))
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(args.rounds):
        for strategy, index in indexes.items():
            seconds, scored, ids = search_all(index, queries, args.top_k)
            best[strategy] = min(best[strategy], seconds)
            rows[strategy] = {
                "trace": " + ".join(folder.name for folder in folders),
                "tokens": trace.keys.shape[1],
                "kv_heads": len(keys),
                "heads_joined": 2 if args.join_heads else 1,
                "head_dim": queries.shape[3],
                "layer": layer,
                "strategy": strategy,
                "keys_scored": scored / asked if scored else None,
                "recall": (exact[..., None] == ids[..., None, :]).any(-1).float().mean().item(),
                "us_per_query": best[strategy] / asked * 1e6,
                "ns_per_key": best[strategy] / scored * 1e9 if scored else None,
            }
    return list(rows.values())


_OF_KEYS = (("keys_scored", 0), ("ns_per_key", 1))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| trace | layer | D | index | keys scored | recall | us a query | ns a key |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        scored, ns = ("-" if row[key] is None else f"{row[key]:.{digits}f}" for key, digits in _OF_KEYS)
        lines.append(
            f"| {row['trace']} | {row['layer']} | {row['head_dim']} | {row['strategy']} | {scored} | "
            f"{row['recall']:.3f} | {row['us_per_query']:.1f} | {ns} |"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index.search_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--traces", nargs="+", type=Path, required=True, help="folders of benchmark.index.extract")
    add("--layers", help="such as 6,13,20-22; default: all of the traces")
    both = f"comma list of {', '.join((*INDEXES, HNSWLIB))}"
    add("--strategies", default="attention_aware_graph,hnsw", help=both)
    add("--join_traces", action="store_true", help="all traces as one prompt, the later ones without their sinks")
    add("--join_heads", action="store_true", help="pairs of kv heads as one of twice the dimension; an odd one is left")
    add("--top_k", type=int, default=100)
    add("--dtype", choices=DTYPES, default="bf16", help="of the keys; faiss keeps its own float32 copy")
    add("--threads", type=int, default=1, help="of build and search; hnsw searches with one")
    add("--rounds", type=int, default=5)
    add("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


@torch.inference_mode()
def run(args: argparse.Namespace) -> str:
    """Checks everything, measures, writes the file and returns the table."""
    args.strategies = list(dict.fromkeys(args.strategies.split(",")))
    allowed = [*INDEXES, *([HNSWLIB] if is_installed() else [])]
    unknown = [name for name in args.strategies if name not in allowed]
    if unknown:
        raise ValueError(f"strategies: got {', '.join(unknown)}, allowed here: {', '.join(allowed)}")
    for name in ("top_k", "threads", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, allowed: >= 1")
    check_writable(args.output)
    folders = [open_folder(path, None if args.layers is None else parse_layers(args.layers)) for path in args.traces]
    for folder in folders:
        if folder.tokens <= SINKS + WINDOW:
            raise ValueError(f"traces: {folder.path} has {folder.tokens} tokens, allowed: more than {SINKS + WINDOW}")
        if args.join_traces and list(folder.files) != list(folders[0].files):
            raise ValueError(
                f"join_traces: {folder.path} has layers {list(folder.files)}, allowed: those of {folders[0].path}, "
                f"{list(folders[0].files)}"
            )
    torch.set_num_threads(args.threads)
    sets = [folders] if args.join_traces else [[folder] for folder in folders]
    for some in sets:
        load(some, next(iter(some[0].files)), args.join_heads)  # what cannot be joined stops here
    layers = [(some, layer) for some in sets for layer in some[0].files]
    where = environment()
    rows = [row for some, layer in tqdm(layers, unit="layer", disable=None) for row in measure(some, layer, args)]
    names = ("strategies", "join_traces", "join_heads", "top_k", "dtype", "threads", "rounds")
    config = {name: getattr(args, name) for name in names}
    write_json(args.output, {"config": config, "environment": where, "rows": rows})
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.index.search_time", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
