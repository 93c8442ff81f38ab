"""Times the build's exact neighbour search on a GPU: python -m benchmark.index.gpu_knn_time --output FILE.json

The lists of one layer, as the graph's build makes them: those of all prompt queries by inner product, causally, and
those of all keys by cosine in the metric of attention. Beside them, of the first kv head, times the kv heads:
  products  the matrix products alone, in 16 bits, causal ones in eight steps; they write the scores to memory
  topk      products in float32 sums and torch.topk, of `slice` queries in the middle of the prompt
  chunks    the method that asks again what thresholds fail to find, of the same queries
all scaled to as many queries as the lists have; queries in the middle see half of the keys, which is the mean. failed
is the share of the first kv head's queries that are asked again, candidates what a query's float32 scores number.
With --traces real states, extended to the shape as benchmark.decode.extended tells, else normal random numbers, whose
scores are more even than those of a model. Exit status 2: bad input.
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
from torch import Tensor

from cache_hub.index.knn import causal_knn, directions, key_knn
from cache_hub.index.metric import query_moment, square_root

from ..command import exit_status
from ..decode.extended import ExtendedTraces, Shape
from ..results import check_writable, environment, write_json
from .traces import open_folder

_STEPS = 8


def seconds(work: Callable[[], object], rounds: int) -> list[float]:
    """Of each round, behind one that is not timed."""
    taken = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        begin = perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(perf_counter() - begin)
    return taken[1:]


def states(shape: Shape, length: int, traces: ExtendedTraces | None) -> tuple[Tensor, Tensor]:
    """Keys [Hkv, N, D] and queries [Hkv, g, N, D] of one layer, bfloat16 on the GPU."""
    if traces is None:
        make = torch.Generator("cuda").manual_seed(0)
        sizes = (shape.kv_heads, length, shape.head_dim), (shape.kv_heads, shape.group, length, shape.head_dim)
        keys, queries = (torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=make) for size in sizes)
        return keys, queries
    found = traces.states(0, 0, length, torch.bfloat16)
    queries = found.queries.view(length, shape.kv_heads, shape.group, shape.head_dim).permute(1, 2, 0, 3)
    return found.keys.transpose(0, 1).contiguous().cuda(), queries.contiguous().cuda()


def by_topk(keys: Tensor, queries: Tensor, visible: Tensor, k: int) -> Tensor:
    """Lists [m, k] by all scores at once."""
    scores = (queries @ keys.T).float()
    hidden = torch.arange(len(keys), device=keys.device) >= visible[:, None]
    return scores.masked_fill_(hidden, float("-inf")).topk(k).indices


def products(keys: Tensor, queries: Tensor, causal: bool) -> None:
    """Of queries [m, D], in steps, with the keys that a step's last query sees."""
    step = -(-len(queries) // _STEPS)
    for begin in range(0, len(queries), step):
        _ = queries[begin : begin + step] @ keys[: begin + step if causal else None].T


def measure(shape: Shape, length: int, traces: ExtendedTraces | None, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for both searches of one layer."""
    from cache_hub.index.chunk_topk import chunk_topk  # Triton only where there is a GPU
    from cache_hub.index.streaming_topk import first_try

    keys, queries = states(shape, length, traces)
    root = square_root(query_moment(queries), 1.0)
    near = directions(keys[:1], root=root[:1])[0]
    places = torch.arange(length, device="cuda")
    searches: list[tuple[str, Callable[[], Tensor], Tensor, Tensor, Tensor, int]] = [
        (
            "causal",
            lambda: causal_knn(keys, queries, places, args.k, backend="triton"),
            keys[0],
            queries[0].reshape(-1, shape.head_dim),
            (places + 1).int().repeat(shape.group),
            args.k,
        ),
        (
            "key",
            lambda: key_knn(keys, args.k, backend="triton", root=root),
            near,
            near,
            torch.full((length,), length, dtype=torch.int32, device="cuda"),
            args.k + 1,
        ),
    ]
    rows = []
    for search, lists, store, asked, visible, k in searches:
        first = max((length - args.slice) // 2, 0)
        middle = slice(first, min(first + args.slice, length))
        some, limits = asked[middle].contiguous(), visible[middle]
        seen = store[: int(limits.max())]
        scale = shape.kv_heads * len(asked) / len(some)
        heads = [part.to(torch.bfloat16) for part in (asked[:length], store)]
        found = first_try(store, asked, visible, k)
        timed = {
            "lists": seconds(lists, args.rounds),
            "products": seconds(partial(products, heads[1], heads[0], search == "causal"), args.rounds),
            "topk": seconds(partial(by_topk, seen, some, limits, k), args.rounds),
            "chunks": seconds(partial(chunk_topk, seen, some, limits, k), args.rounds),
        }
        factors = {"lists": 1.0, "products": shape.kv_heads * len(asked) / length, "topk": scale, "chunks": scale}
        rows.append(
            {
                "tokens": length,
                "search": search,
                "seconds": {name: [taken * factors[name] for taken in times] for name, times in timed.items()},
                "failed": float(found.failed.float().mean()),
                "candidates": float(found.candidates.float().mean()),
                "states": "normal random numbers" if traces is None else traces.describe(length),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, ms of a layer."""
    names = ("lists", "products", "topk", "chunks")
    lines = [
        f"| tokens | lists of | {' | '.join(names)} | asked again | candidates |",
        "|---:|---|" + "---:|" * (len(names) + 2),
    ]
    for row in rows:
        times = " | ".join(f"{1e3 * median(row['seconds'][name]):.1f}" for name in names)
        lines.append(
            f"| {row['tokens']} | {row['search']} | {times} | {100 * row['failed']:.2f} % | {row['candidates']:.0f} |"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index.gpu_knn_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--traces", nargs="+", type=Path, help="folders of benchmark.index.extract; default: random numbers")
    add("--shape", default="32,32,8,128", help="layers,heads,kv_heads,head_dim; one layer is measured")
    add("--lengths", default="32768,131072", help="comma list of tokens")
    add("--k", type=int, default=32)
    add("--slice", type=int, default=4096, help="queries of topk and chunks")
    add("--rounds", type=int, default=3)
    add("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


@torch.inference_mode()
def run(args: argparse.Namespace) -> str:
    """Checks everything, measures, writes the file and returns the table."""
    words = args.lengths.split(",")
    if not all(word.strip().isdecimal() and int(word) > 1 for word in words):
        raise ValueError(f"lengths: got {args.lengths!r}, allowed: whole numbers above 1, such as 32768,131072")
    for name in ("k", "slice", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, allowed: >= 1")
    lengths, shape = [int(word) for word in words], Shape.parse(args.shape)
    if args.k >= min(lengths):
        raise ValueError(f"k: got {args.k}, allowed: fewer than the {min(lengths)} tokens")
    check_writable(args.output)
    traces = None if args.traces is None else ExtendedTraces([open_folder(path) for path in args.traces], shape, 1)
    for length in lengths if traces is not None else ():
        traces.pieces(length)  # type: ignore[union-attr]
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device, allowed: a machine with a GPU")
    rows = [row for length in lengths for row in measure(shape, length, traces, args)]
    config = {name: getattr(args, name) for name in ("shape", "k", "slice", "rounds")}
    write_json(args.output, {"config": config, "environment": environment(), "rows": rows})
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.index.gpu_knn_time", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
