"""Measures what a build needs in RAM: python -m benchmark.index.build_memory --traces FOLDER --output FILE.json

A process of its own (benchmark.index.build_process) fills the strategy's cache layer by layer, as prefill does, with
the trace's queries, keys and values; once with all layers, once with the first one alone. Counted are the pages that
are resident (the kernel's VmHWM, set back at each stage) over those before the cache was made. Not counted: libraries
and threads, since a small build goes before, whose freed memory is given back to the system; and a layer's states,
which any prefill holds: they lie in buffers that are resident from the start, and this process sends the layers into
them one by one, so that no file is read and no layer waits there. Memory that was freed and that the allocator keeps
is counted, as the machine must have it.

peak_bytes: the most at any time; kv_bytes and index_bytes: what the cache says it keeps; peak_ratio: the first by the
sum of both. held_bytes: what was resident at the process's end, freed memory given back; only in the row that ended it.
stages: the most in a stage of any layer over what was resident when that layer began. query_key_knn includes the copies
of the queries, projection all of the links' making. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cache_hub import STRATEGIES
from config import ESTIMATIONS, RetroInferConfig
from config.schema import ESTIMATING

from ..command import exit_status
from ..results import check_writable, environment, write_json
from .layers import parse_layers
from .search_time import DTYPES
from .sweeps import Configuration
from .traces import LayerTrace, TraceFolder, open_folder

Named = tuple[str, RetroInferConfig]


def builds(args: argparse.Namespace, folder: TraceFolder) -> list[list[Named]]:
    """Estimations with their settings, those together that one filled cache can serve. Raises ConfigError."""
    model = str(folder.info.get("protocol", {}).get("model", "unknown"))
    together: dict[str, list[Named]] = defaultdict(list)
    for estimation in args.estimations:
        wanted = Configuration(estimation, args.strategy, {"attention_aware_graph.estimation": estimation})
        settings = wanted.settings(model, folder.tokens, args.set)
        together[STRATEGIES[args.strategy].build_key(settings)].append((estimation, settings))
    return list(together.values())


def states(trace: LayerTrace, dtype: torch.dtype) -> Iterator[Tensor]:
    """Queries [n, H, D], keys and values [n, Hkv, D] as bytes, one after the other."""
    for rows in (trace.queries.flatten(0, 1), trace.keys, trace.values):
        yield rows.transpose(0, 1).to(dtype).contiguous().view(torch.uint8)


def measure(args: argparse.Namespace, folder: TraceFolder, layers: Sequence[int], build: list[Named]) -> list[Any]:
    """A row for every estimation of a build of these layers. Raises RuntimeError where its process fails."""
    kv_heads, group, n, head_dim = folder.load(layers[0]).queries.shape
    request = {
        "strategy": args.strategy,
        "settings": [settings.model_dump() for _, settings in build],
        "shape": [len(layers), n, kv_heads, group, head_dim],
        "dtype": args.dtype,
        "threads": args.threads,
    }
    words = [sys.executable, "-m", "benchmark.index.build_process", json.dumps(request)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        try:
            for layer in tqdm(layers, unit="layer", desc=build[-1][0], disable=None):
                for part in states(folder.load(layer), DTYPES[args.dtype]):
                    process.stdin.write(part.numpy().tobytes())
        except BrokenPipeError:
            pass  # Its error is on standard error, its status tells it here.
        written, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the measuring process ended with status {process.returncode}")
    rows = []
    for (estimation, _), row in zip(build, json.loads(written), strict=True):
        ratio = row["peak_bytes"] / (row["kv_bytes"] + row["index_bytes"])
        rows.append({"estimation": estimation, "layers": len(layers), **row, "peak_ratio": ratio})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown, MiB."""
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages"]))
    heads = ["KV", "index", "held", "peak", "peak / (KV + index)", *stages]
    lines = [f"| trace | layers | estimation | {' | '.join(heads)} |", "|---|---:|---|" + "---:|" * len(heads)]
    mib = lambda size: f"{size / 2**20:.1f}"  # noqa: E731
    for row in rows:
        sizes = [
            mib(row[key]) if key in row else "-" for key in ("kv_bytes", "index_bytes", "held_bytes", "peak_bytes")
        ]
        cells = [*sizes, f"{row['peak_ratio']:.2f}", *(mib(row["stages"].get(stage, 0)) for stage in stages)]
        lines.append(f"| {row['trace']} | {row['layers']} | {row['estimation']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index.build_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--traces", nargs="+", type=Path, required=True, help="folders of benchmark.index.extract")
    add("--layers", help="such as 6,13,20-22; default: all of the traces")
    add("--strategy", choices=ESTIMATING, default="attention_aware_graph")
    add("--estimations", default=",".join(ESTIMATIONS), help=f"comma list of {', '.join(ESTIMATIONS)} (default: all)")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for all builds; may be repeated")
    add("--dtype", choices=DTYPES, default="bf16", help="of states and store")
    add("--threads", type=int, default=1)
    add("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Checks everything, measures, writes the file and returns the table."""
    given = args.estimations.split(",")
    unknown = [name for name in given if name not in ESTIMATIONS]
    if unknown:
        raise ValueError(f"estimations: got {', '.join(unknown)}, allowed: {', '.join(ESTIMATIONS)}")
    # In this order: the clusters come on top of what is there without an estimate.
    args.estimations = [name for name in ESTIMATIONS if name in given]
    if args.threads < 1:
        raise ValueError(f"threads: got {args.threads}, allowed: >= 1")
    check_writable(args.output)
    folders = [open_folder(path, None if args.layers is None else parse_layers(args.layers)) for path in args.traces]
    planned = [(folder, build) for folder in folders for build in builds(args, folder)]
    rows, where = [], environment()
    for folder, build in planned:
        layers = list(folder.files)
        for some in [layers, layers[:1]] if len(layers) > 1 else [layers]:
            shape = {"trace": folder.name, "tokens": folder.tokens}
            rows += [{**shape, **row} for row in measure(args, folder, some, build)]
    names = ("strategy", "estimations", "set", "dtype", "threads")
    config = {**{name: getattr(args, name) for name in names}, "layers": args.layers or "all"}
    write_json(args.output, {"config": config, "environment": where, "rows": rows})
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.index.build_memory", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
