"""Measures strategies on recorded attention states: python -m benchmark.index --traces FOLDER.. --strategies a,b

Each trace goes layer by layer through the strategy's own KV cache, all kv heads of a layer at once, and every test
query is asked about the prompt. Rows are written as they are finished; a call with the same settings goes on behind.
Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from model_hub.loading import DTYPES

from ..command import exit_status
from .bench import Bench
from .layers import parse_layers
from .measures import METRICS
from .results import ResultsFile
from .sweeps import choose
from .traces import open_folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--traces", nargs="+", type=Path, required=True, help="folders of benchmark.index.extract")
    add("--strategies", help="comma list; with --sweep: only its rows of these")
    add(
        "--sweep",
        type=Path,
        help='JSON list of {"name", "strategy", "set"}, such as benchmark/index/sweeps/budgets.json',
    )
    add("--metrics", default=",".join(METRICS), help=f"comma list of {', '.join(METRICS)} (default: all)")
    add("--layers", help="such as 0,3,10-12; default: all of the traces")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every row; may be repeated")
    add("--device", default="cpu", help="cpu or cuda:N (default: cpu)")
    add("--dtype", default="fp32", choices=sorted(DTYPES), help="of the caches' stores (default: fp32)")
    add("--output", type=Path, required=True, help="JSON file of the rows")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Checks everything that was given, then measures what `output` has no row of."""
    metrics = [name.strip() for name in args.metrics.split(",")]
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics: got {name!r}, allowed: {', '.join(METRICS)}")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if args.device not in devices:
        raise ValueError(f"device: got {args.device!r}, allowed here: {', '.join(devices)}")
    for setting in args.set:
        if not setting.partition("=")[0] or "=" not in setting:
            raise ValueError(f"set: got {setting!r}, allowed: SECTION.KEY=VALUE")
    configurations = choose(args.strategies.split(",") if args.strategies else None, args.sweep)
    layers = None if args.layers is None else parse_layers(args.layers)
    protocol = {"device": args.device, "dtype": args.dtype, "layers": layers or "all", "metrics": sorted(metrics)}
    output = ResultsFile(args.output, protocol)
    folders = [open_folder(path, layers) for path in args.traces]
    Bench(args.device, DTYPES[args.dtype], metrics, output).run(folders, configurations, args.set)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.index", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
