"""Methods that keep a budget, side by side: python -m benchmark.report.budgets RESULTS... --against snapkv

RESULTS are folders of benchmark.runner. One Markdown table for each folder and mean: a line for each method, a column
for each budget (what stands behind the @ of a strategy's name), the benchmark's mean over tasks (- where some are
missing), and in brackets the paired difference from the method --against at the same budget, with its 95 % percentile
bootstrap interval over the samples within each task; bold where that leaves out 0. Strategies without a budget follow,
with the tokens that they attended to. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from ..command import exit_status
from .estimates import Estimates
from .groups import Group, group_folders
from .load import read_folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.report.budgets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, help="folders with a results.json")
    parser.add_argument("--against", default="snapkv", help="the method that the others are compared with")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.report.budgets", lambda: run(args))


def run(args: argparse.Namespace) -> str:
    """The tables; ValueError and FileNotFoundError as read_folder and group_folders, and for a method without a row."""
    groups = [group for path in args.results for group in group_folders([read_folder(path)])]
    return "\n\n".join(
        budget_table(group, length, kind, args.against)
        for group in groups
        for length in group.lengths
        for kind in Estimates(group).averages(length)
    )


def budget_table(group: Group, length: int | None, kind: str, against: str) -> str:
    """The table of one length and one of the benchmark's means."""
    estimates = Estimates(group)
    methods: dict[str, dict[int, str]] = {}
    others = []
    for row in group.rows:
        if estimates.average(row, length, kind) is None:
            continue
        named = _method_and_budget(row)
        if named is None:
            others.append(row)
        else:
            methods.setdefault(named[0], {})[named[1]] = row
    if against not in methods:
        raise ValueError(
            f"against: got {against!r}, allowed: {', '.join(methods) or 'no method with a budget is there'}"
        )
    budgets = sorted({budget for rows in methods.values() for budget in rows})
    label = estimates.averages(length)[kind].label
    counted = f"{group.name}, {label}" + (f", {length:,} tokens" if length else "")
    lines = [f"| {counted} | {' | '.join(map(str, budgets))} |", "|---" * (len(budgets) + 1) + "|"]
    for method, rows in methods.items():
        cells = []
        for budget in budgets:
            reference = methods[against].get(budget)
            cells.append(_cell(estimates, rows.get(budget), reference, length, kind))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    for row in others:
        average = estimates.average(row, length, kind)
        if average is None or average[0].label != label:
            continue
        shares = [group.entries[(row, *where)].costs.get("attended_share", math.nan) for where in average[1]]
        attended = sum(shares) / len(shares) * (length or 100)
        about = f"{attended:.0f} tokens" if length else f"{attended:.1f} %"
        found = estimates.score(row, average[1])
        lines.append(
            f"| {row} ({about} attended) | {found.value:.1f} [{found.low:.1f}, {found.high:.1f}]{' |' * len(budgets)}"
        )
    return "\n".join(lines)


def _cell(estimates: Estimates, row: str | None, against: str | None, length: int | None, kind: str) -> str:
    found = None if row is None else estimates.average(row, length, kind)
    if row is None or found is None or found[0].label != estimates.averages(length)[kind].label:
        return "-"
    weights = found[1]
    score = f"{estimates.score(row, weights).value:.1f}"
    if against is None or against == row:
        return score
    apart = estimates.difference(row, against, weights)
    if apart is None:
        return score
    told = f"{apart.value:+.1f} [{apart.low:+.1f}, {apart.high:+.1f}]"
    return f"{score} (**{told}**)" if apart.low > 0 or apart.high < 0 else f"{score} ({told})"


def _method_and_budget(row: str) -> tuple[str, int] | None:
    """ "snapkv@512" -> ("snapkv", 512); None for a strategy without a budget."""
    name, at, budget = row.partition("@")
    return (name, int(budget)) if at and budget.isdigit() else None


if __name__ == "__main__":
    sys.exit(main())
