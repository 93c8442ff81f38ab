"""Plots ms per token against the context: python -m benchmark.decode.latency_plot FILE.json --output PLOT.png

A panel for each batch size, a line for each strategy, of one or more files of benchmark.decode.latency. Exit status 2:
bad input.
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
    """The plot as PNG, axes logarithmic."""
    from ..report.plots import Point, against_cost  # imports matplotlib

    batches = sorted({row["batch"] for row in rows})
    points = [
        Point(
            tuple(row["context_len"] / 1024 if row["batch"] == batch else None for batch in batches),
            row["ms_per_token"],
            number(row["ms_per_token"]),
            row["name"],
        )
        for row in sorted(rows, key=lambda row: row["context_len"])
    ]
    titles = [f"context, 1,024 tokens, batch {batch}" for batch in batches]
    series = list(dict.fromkeys(row["name"] for row in rows))
    return against_cost(titles, "ms per token", points, [True] * len(titles), logarithmic_y=True, coloured=series)


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
