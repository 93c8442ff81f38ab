"""Plots ms per token against the context: python -m benchmark.decode.latency_plot FILE.json --output PLOT.png

A line for each strategy and batch size of one or more files of benchmark.decode.latency. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..command import exit_status
from ..index.results import read_results
from ..report.text import number
from ..results import check_writable

_NEEDED = ("name", "context_len", "batch", "ms_per_token")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.decode.latency_plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, help="files of python -m benchmark.decode.latency")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    return parser.parse_args(argv)


def draw(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The plot as PNG, both axes logarithmic; the batch size stands in the names where there are several."""
    from ..report.plots import Point, against_cost  # imports matplotlib

    several = len({row["batch"] for row in rows}) > 1
    points = [
        Point(
            (row["context_len"] / 1024,),
            row["ms_per_token"],
            number(row["ms_per_token"], digits=1),
            f"{row['name']}, batch {row['batch']}" if several else row["name"],
        )
        for row in sorted(rows, key=lambda row: (row["batch"], row["context_len"]))
    ]
    names = list(dict.fromkeys(row["name"] for row in rows))
    order = sorted({point.series for point in points}, key=lambda name: names.index(name.split(", ")[0]))
    return against_cost(
        ["context, 1,024 tokens"], "ms per token", points, [True], logarithmic_y=True, coloured=order
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Reads, checks, draws and writes; ModuleNotFoundError without matplotlib, ValueError for files of another kind."""
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError('the plot needs matplotlib: python -m pip install -e ".[benchmark]"')
    check_writable(args.output)
    rows = []
    for path in args.results:
        found = read_results(path)["rows"]
        if not found or any(key not in row for row in found for key in _NEEDED):
            raise ValueError(f"{path}: no rows with {', '.join(_NEEDED)}, allowed: files of benchmark.decode.latency")
        rows += found
    part = args.output.with_name(f"{args.output.name}.part")
    part.write_bytes(draw(rows))
    os.replace(part, args.output)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.decode.latency_plot", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
