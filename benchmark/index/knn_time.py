"""Times the exact neighbour search of the build: python -m benchmark.index.knn_time --traces DIR.. --output FILE.json

Every backend makes a layer's lists as the graph's build does: those of all prompt queries by inner product, causally,
and those of all keys by cosine in the metric of attention, sinks and window left out. Backends take turns in every
round. A ratio is the median over the rounds of the first backend's seconds over another's in the same round. Lists (of
each kv head's first query head) are compared with the first backend's: the share of ids in common, and where ids
differ, how far the scores of the two lists are apart at most, in float64, relative to the lengths of query and keys: a
tie that rounding decides is near 1e-7. candidates: keys that native scored in float32 for a query, after the products
of tiles. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cache_hub.index import _native
from cache_hub.index.knn import causal_knn, directions, key_knn
from cache_hub.index.knn_backends import choose_backend
from cache_hub.index.metric import query_moment, square_root
from cache_hub.index.native_knn import native_topk

from ..command import exit_status
from ..results import check_writable, environment, write_json
from .exact_head import SINKS, WINDOW
from .layers import parse_layers
from .search_time import DTYPES
from .traces import TraceFolder, open_folder

_CPU = torch.device("cpu")
_COMPARED = 4096  # lists at a time


def difference(lists: Tensor, others: Tensor, keys: Tensor, queries: Tensor) -> tuple[float, float]:
    """The share of the ids of lists [m, k] that are in others [m, k], and the largest difference of their sorted
    products, of keys [n, D] and queries [m, D], over the product of the lengths."""
    common, gap = 0, 0.0
    for some in torch.arange(len(lists)).split(_COMPARED):
        mine, theirs = lists[some].sort().values, others[some].sort().values
        same = mine == theirs
        for row in (~same.all(1)).nonzero().flatten().tolist():
            common += int(torch.isin(mine[row], theirs[row]).sum())
            query = queries[some[row]].double()
            found, wanted = (keys[ids[ids >= 0].long()].double() for ids in (mine[row], theirs[row]))
            if len(found) != len(wanted):
                return 0.0, float("inf")
            apart = ((found @ query).sort().values - (wanted @ query).sort().values).abs().max()
            gap = max(gap, float(apart / (query.norm() * wanted.norm(dim=1).max())))
        common += int(same.all(1).sum()) * lists.shape[1]
    return common / lists.numel(), gap


def _of_first_head(lists: Tensor) -> Tensor:
    """Lists [R, m, k] out of [R, g, m, k]; those of keys, [R, n, k], as they are."""
    return lists[:, 0] if lists.dim() == 4 else lists


def candidates(keys: Tensor, queries: Tensor, visible: Tensor, k: int) -> float:
    """Keys that native scores, a query: keys [n, D], queries [m, D], visible [m]."""
    return native_topk(keys, queries.float(), visible, k)[1] / len(queries)


def measure(folder: TraceFolder, layer: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for both searches: seconds of every round, ratios, agreement."""
    trace, dtype = folder.load(layer), DTYPES[args.dtype]
    keys = trace.keys[:, SINKS : trace.keys.shape[1] - WINDOW].to(dtype).contiguous()
    queries = trace.queries.to(dtype)
    positions = torch.arange(queries.shape[2]) - SINKS
    root = square_root(query_moment(queries), 1.0)
    near = directions(keys, root=root)
    n = keys.shape[1]
    visible = (positions + 1).clamp(0, n)

    def causal(backend: str) -> Tensor:
        return causal_knn(keys, queries, positions, args.k, args.block, backend)

    def by_key(backend: str) -> Tensor:
        return key_knn(keys, args.k, args.block, backend, root=root)

    searches: dict[str, tuple[Callable[[str], Tensor], Tensor, Tensor]] = {
        "causal": (causal, queries[:, :1], keys),
        "key": (by_key, near[:, None], near),
    }
    rows = []
    for search, (lists_by, asked, store) in searches.items():
        seconds: dict[str, list[float]] = {backend: [] for backend in args.backends}
        lists: dict[str, Tensor] = {}
        for _ in range(args.rounds):
            for backend in args.backends:
                begin = perf_counter()
                lists[backend] = lists_by(backend)
                seconds[backend].append(perf_counter() - begin)
        first = args.backends[0]
        compared = {
            backend: [
                difference(found, wanted, store[r], asked[r, 0])
                for r, (found, wanted) in enumerate(
                    zip(_of_first_head(mine), _of_first_head(lists[first]), strict=True)
                )
            ]
            for backend, mine in lists.items()
        }
        limits = visible if search == "causal" else torch.full((n,), n)
        rows.append(
            {
                "trace": folder.name,
                "tokens": folder.tokens,
                "head_dim": keys.shape[2],
                "layer": layer,
                "search": search,
                "seconds": seconds,
                "ratio": {
                    backend: median(a / b for a, b in zip(seconds[first], seconds[backend], strict=True))
                    for backend in args.backends
                },
                "agreement": {backend: min(share for share, _ in heads) for backend, heads in compared.items()},
                "largest_gap": {backend: max(gap for _, gap in heads) for backend, heads in compared.items()},
                "candidates": candidates(store[0], asked[0, 0], limits, args.k + (search == "key")),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, a line for every backend."""
    lines = [
        "| trace | layer | lists of | backend | seconds | ratio | ids in common |",
        "|---|---:|---|---|---:|---:|---:|",
    ]
    for row in rows:
        for backend, seconds in row["seconds"].items():
            lines.append(
                f"| {row['trace']} | {row['layer']} | {row['search']} | {backend} | {median(seconds):.2f} | "
                f"{row['ratio'][backend]:.2f} | {row['agreement'][backend]:.6f} |"
            )
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index.knn_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--traces", nargs="+", type=Path, required=True, help="folders of benchmark.index.extract")
    add("--layers", help="such as 6,13,20-22; default: all of the traces")
    add("--backends", default="faiss,native,torch", help="comma list; the others are compared with the first")
    add("--k", type=int, default=32)
    add("--dtype", choices=DTYPES, default="bf16", help="of keys and queries")
    add("--block", type=int, default=4096, help="graph_build_batch")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=5)
    add("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


@torch.inference_mode()
def run(args: argparse.Namespace) -> str:
    """Checks everything, measures, writes the file and returns the table."""
    args.backends = list(dict.fromkeys(args.backends.split(",")))
    for backend in args.backends:
        choose_backend(backend, _CPU)
    for name in ("k", "block", "threads", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, allowed: >= 1")
    check_writable(args.output)
    folders = [open_folder(path, None if args.layers is None else parse_layers(args.layers)) for path in args.traces]
    for folder in folders:
        if folder.tokens <= SINKS + WINDOW + 1:
            raise ValueError(
                f"traces: {folder.path} has {folder.tokens} tokens, allowed: more than {SINKS + WINDOW + 1}"
            )
    torch.set_num_threads(args.threads)
    layers = [(folder, layer) for folder in folders for layer in folder.files]
    rows = [row for folder, layer in tqdm(layers, unit="layer", disable=None) for row in measure(folder, layer, args)]
    config = {name: getattr(args, name) for name in ("backends", "k", "dtype", "block", "threads", "rounds")}
    config["tile_kernel"] = _native.tile_kernels()[0]
    write_json(args.output, {"config": config, "environment": environment(), "rows": rows})
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.index.knn_time", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
