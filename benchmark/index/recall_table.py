"""The README's table of recall against cost: python -m benchmark.index.recall_table RESULTS.json [--only WORDS]

Prints Markdown from files of benchmark.index, a table for every model and context length: what the search found, and
what it scored (its time: benchmark.index.search_time). Means over heads and traces; worst heads of the worst
trace. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..command import exit_status
from ..report.blocks import Block, Cell, Paragraph, Table, to_markdown
from ..report.text import number, percent, tokens
from .averages import Group, group_rows
from .results import read_results

_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("recall", "recall", partial(number, digits=3)),
    ("worst head", "recall_worst", partial(number, digits=3)),
    ("mass of exact", "mass_of_exact", partial(number, digits=3)),
    ("worst head", "mass_of_exact_worst", partial(number, digits=3)),
    ("median error", "error_median", partial(number, digits=4)),
    ("keys scored", "keys_scored", lambda count: f"{count:,.0f}"),
    ("of the context", "scored_share", percent),
)


def recall_table(group: Group) -> Table:
    """One row a configuration that has a recall; columns that none of them states are left out."""
    averages = [average for average in group.averages if "recall" in average.values]
    shown = [column for column in _COLUMNS if any(column[1] in average.values for average in averages)]
    rows = [
        [
            Cell(average.name),
            *(Cell(write(average.values[key]) if key in average.values else "\N{EN DASH}") for _, key, write in shown),
        ]
        for average in averages
    ]
    return Table(["", *(title for title, _, _ in shown)], rows)


def run(args: argparse.Namespace) -> str:
    """The tables. Raises ValueError where no row has a recall, or a name of `only`, and as read_results."""
    rows = [row for path in args.results for row in read_results(path)["rows"] if row.get("recall")]
    if args.only is not None:
        rows = [row for row in rows if args.only in row["name"]]
    if not rows:
        named = "" if args.only is None else f" and {args.only!r} in its name"
        raise ValueError(f"results: no row with a recall{named}, allowed: one or more")
    blocks: list[Block] = []
    for group in group_rows(rows):
        blocks += [
            Paragraph(f"{group.model}, {tokens(group.context_len)} tokens, {', '.join(group.traces)}:"),
            recall_table(group),
        ]
    return to_markdown(blocks).rstrip("\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index.recall_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, help="files of python -m benchmark.index")
    parser.add_argument("--only", help="rows with these words in their names")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.index.recall_table", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
