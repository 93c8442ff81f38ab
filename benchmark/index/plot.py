"""Tables and plots of result rows: python -m benchmark.index.plot RESULTS.json --output FOLDER

Writes FOLDER/index.md, prints it, and plots for every model and context length the output error against what is read
and scored, recall and attention mass against what is scored. Rows of a strategy whose names differ in numbers alone are
one line, labelled by these numbers. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ..command import exit_status
from ..report.blocks import Block, Cell, Heading, Image, Images, Paragraph, Table, to_markdown
from ..report.text import mebibytes, number, tokens
from ..results import write_text
from .averages import Average, Group, group_rows
from .results import read_results

# Below it the error is that of float32: an exact strategy, which would take most of a logarithmic axis for itself.
EXACT = 1e-5
_NOTE = (
    "Output error: relative L2 distance of a query head's attention output from full attention's; median, mean and "
    "90th percentile over layers, query heads and test queries, worst head by its mean over queries. Recall of the "
    "strategy's own top k, over the indexed keys. Mass: full attention's softmax weight on the tokens attended to, "
    "relative to what the exact top k would have. Tokens attended and clusters estimated: per kv head and query, the "
    "union over its query heads. KiB read: their keys and values. Keys scored: inner products of the search, per query "
    "head. Several traces: means over them, worst heads of the worst trace."
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="files of python -m benchmark.index")
    parser.add_argument("--output", type=Path, required=True, help="folder for index.md and the plots")
    return parser.parse_args(argv)


def make_plots(results: Sequence[Path], output: Path) -> str:
    """Writes the Markdown document and its plots, and returns the document.

    Raises ModuleNotFoundError without matplotlib, and as read_results and group_rows, before anything is written.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError('the plots need matplotlib: python -m pip install -e ".[benchmark]"')
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: got the file {output}, allowed: a folder")
    groups = group_rows([row for path in results for row in read_results(path)["rows"]])
    blocks: list[Block] = [Heading(1, "Strategies on recorded attention states"), Paragraph(_NOTE)]
    images: list[Image] = []
    series = list(dict.fromkeys(how.series for group in groups for how in group.drawn()))
    for group in groups:
        drawn = figures(group, series)
        images += drawn
        blocks += [
            Heading(2, f"{group.model}, {tokens(group.context_len)}"),
            Paragraph(f"Traces: {', '.join(group.traces)}."),
            table(group),
            *([Images(drawn)] if drawn else []),
        ]
    output.mkdir(parents=True, exist_ok=True)
    for image in images:
        part = output / f"{image.file}.part"
        part.write_bytes(image.png)
        os.replace(part, output / image.file)
    document = to_markdown(blocks)
    write_text(output / "index.md", document)
    return document


def table(group: Group) -> Table:
    """One row a configuration; columns that no configuration states are left out."""
    short = partial(number, digits=3)
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("error: median", "error_median", short),
        ("mean", "error_mean", short),
        ("p90", "error_p90", short),
        ("worst head", "error_worst", short),
        ("recall", "recall", short),
        ("mass of exact", "mass_of_exact", short),
        ("worst head", "mass_of_exact_worst", short),
        ("tokens attended", "tokens_attended", partial(number, digits=0)),
        ("clusters estimated", "rows_estimated", partial(number, digits=0)),
        ("KiB read", "bytes_read", lambda size: number(size / 1024)),
        ("keys scored", "keys_scored", partial(number, digits=0)),
        ("index", "index_bytes", mebibytes),
        ("KV", "kv_bytes", mebibytes),
        ("build", "build_seconds", lambda seconds: f"{number(seconds)} s"),
    ]
    shown = [column for column in columns if any(column[1] in average.values for average in group.averages)]
    several = len(group.traces) > 1
    rows = [
        [
            Cell(average.name),
            *[Cell(str(average.traces))] * several,
            *(
                Cell(write(average.values[key])) if key in average.values else Cell("\N{EN DASH}")
                for _, key, write in shown
            ),
        ]
        for average in group.averages
    ]
    return Table(["", *["traces"] * several, *(title for title, _, _ in shown)], rows)


def figures(group: Group, series: Sequence[str]) -> list[Image]:
    """Error against bytes and keys scored, recall and mass against keys scored; none where nothing is to be drawn.
    series: all that get a colour, so that it is the same in other groups' figures."""
    from ..report.plots import Point, against_cost  # imports matplotlib

    length = f"{tokens(group.context_len)} tokens"
    where = f"{Path(group.model).name}, {length}"
    end = f"{Path(group.model).name}_{group.context_len}.png"
    drawn = group.drawn()

    def points(y: str, x: Sequence[tuple[str, float]], least: float, by_top_k: bool) -> list[Point]:
        """Those above `least` in y; x: (cost, unit) of every panel; by_top_k: a line for each top_k."""

        def at(average: Average, key: str, unit: float) -> float | None:
            return average.values[key] / unit if average.values.get(key) else None

        return [
            Point(
                tuple(at(average, *cost) for cost in x),
                average.values[y],
                how.label,
                how.series,
                f"top {average.top_k}" if by_top_k else "",
            )
            for average, how in zip(group.averages, drawn, strict=True)
            if average.values.get(y, -1.0) > least
        ]

    images = []
    if errors := points("error_median", [("bytes_read", 1024), ("keys_scored", 1)], EXACT, False):
        titles = ["KiB read per kv head and query", "keys scored per query head and query"]
        y_title = f"median output error, {length}"
        png = against_cost(titles, y_title, errors, [True, True], logarithmic_y=True, better="lower", coloured=series)
        images.append(Image(f"error_{end}", png, f"Output error against KiB read and keys scored, {where}"))
    for file, y, y_title in (
        ("recall", "recall", "recall of the top k"),
        ("mass", "mass_of_exact", "attention mass, of the exact top k's"),
    ):
        if shares := points(y, [("keys_scored", 1)], 0.0, True):
            titles = ["keys scored per query head and query; above: of the context"]
            title = f"{y_title}, {length}"
            png = against_cost(titles, title, shares, [True], better="higher", coloured=series, whole=group.tokens)
            images.append(Image(f"{file}_{end}", png, f"{y_title.capitalize()} against keys scored, {where}"))
    return images


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.index.plot", lambda: make_plots(args.results, args.output).rstrip("\n"))


if __name__ == "__main__":
    sys.exit(main())
