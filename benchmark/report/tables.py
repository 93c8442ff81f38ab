"""A group's tables: means, tasks, costs, and what it was made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from .blocks import Cell, Table
from .bootstrap import Interval
from .estimates import Estimates, Weights
from .groups import Group
from .load import COSTS, Folder
from .protocols import flat_settings, side_by_side
from .text import ends, mebibytes, number, percent, tokens

NOTHING = Cell("\N{EN DASH}")
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "attended_share": ("tokens attended", percent),
    "estimated_share": ("clusters read", percent),
    "scored_share": ("keys scored", percent),
    "index_bytes": ("index", mebibytes),
    "kv_bytes": ("KV cache", mebibytes),
    "index_share": ("index / KV cache", percent),
    "read_bytes": ("KV read a step", mebibytes),
    "recall": ("recall", partial(number, digits=3)),
    "mass": ("attention mass", partial(number, digits=3)),
}


def overview(estimates: Estimates) -> Table:
    """Rows against lengths and kinds of mean: mean score, drop against full attention; last the task that lost most."""
    group = estimates.group
    kinds = {
        (length, kind): average.label
        for length in group.lengths
        for kind, average in estimates.averages(length).items()
    }
    one_kind = len(set(kinds.values())) == 1 and group.lengths != [None]
    columns = {
        tokens(length) if one_kind else ", ".join(filter(None, (tokens(length), label))): [
            _mean_cell(estimates, row, length, kind) for row in group.rows
        ]
        for (length, kind), label in kinds.items()
    }
    if len(group.lengths) > 1:
        first_kind = next(iter(kinds))[1]
        columns["mean of the lengths"] = [_all_lengths(estimates, row, first_kind) for row in group.rows]
    columns["largest drop of a task"] = [_largest_drop(estimates, row) for row in group.rows]
    shown = {title: cells for title, cells in columns.items() if any(cell != NOTHING for cell in cells)}
    rows = [[Cell(row), *(cells[i] for cells in shown.values())] for i, row in enumerate(group.rows)]
    return Table(["strategy", *shown], rows)


def tasks_at(estimates: Estimates, length: int | None) -> Table:
    """Tasks against rows at one length, the benchmark's means below."""
    group = estimates.group
    rows_here = [row for row in group.rows if group.tasks(length, row)]
    table = []
    for task in group.tasks(length):
        counts = {
            len(group.entries[row, length, task].scores) for row in rows_here if (row, length, task) in group.entries
        }
        cells = [
            _score_cell(estimates, row, {(length, task): 1.0}) if (row, length, task) in group.entries else NOTHING
            for row in rows_here
        ]
        table.append([Cell(task), Cell(" or ".join(map(str, sorted(counts)))), *cells])
    means = estimates.averages(length)
    for kind, average in means.items():
        cells = [_mean_cell(estimates, row, length, kind) for row in rows_here]
        table.append([Cell(average.label), Cell(""), *cells])
    return Table(["task", "samples", *rows_here], table, last_apart=len(means) == 1)


def costs(group: Group) -> Table | None:
    """Mean costs over the tasks of every row and length, None where none were measured."""
    means = {
        (row, length): mean_costs(group, row, length)
        for row in group.rows
        for length in group.lengths
        if group.tasks(length, row)
    }
    columns = {key: written for key, written in _COSTS.items() if any(key in found for found in means.values())}
    if not columns:
        return None
    with_length = group.lengths != [None]
    rows = []
    for (row, length), found in means.items():
        cells = [Cell(write(found[key])) if key in found else NOTHING for key, (_, write) in columns.items()]
        rows.append([Cell(row), *[Cell(tokens(length))] * with_length, *cells])
    return Table(["strategy", *["context"] * with_length, *(title for title, _ in columns.values())], rows)


def mean_costs(group: Group, row: str, length: int | None) -> dict[str, float]:
    """Means over the tasks that state a cost, "index_share", index bytes over KV bytes, and "read_bytes", the keys and
    values of the tokens and clusters that a decode step attends to; without a statement there are no clusters."""
    entries = [group.entries[row, length, task] for task in group.tasks(length, row)]
    means = {}
    for key in COSTS:
        if stated := [entry.costs[key] for entry in entries if key in entry.costs]:
            means[key] = sum(stated) / len(stated)
    if means.get("kv_bytes") and "index_bytes" in means:
        means["index_share"] = means["index_bytes"] / means["kv_bytes"]
    if {"kv_bytes", "attended_share"} <= means.keys():
        means["read_bytes"] = (means["attended_share"] + means.get("estimated_share", 0.0)) * means["kv_bytes"]
    return means


def made_with(folders: Sequence[Folder]) -> tuple[Table | None, Table]:
    """(settings that differ between the folders, settings that all share): protocol, hardware, versions, commit."""
    settings = []
    for folder in folders:
        protocol, where = flat_settings(folder.protocol), flat_settings(folder.environment)
        plain = {key: value for key, value in protocol.items() if "." not in key}
        settings.append({**plain, **{f"environment.{key}": value for key, value in where.items()}, **protocol})
    equal, differing = side_by_side(settings)
    shared = Table(["setting", "value"], [[Cell(key), Cell(value)] for key, value in equal.items()], names=True)
    if not differing:
        return None, shared
    rows = [
        [Cell(key), *(NOTHING if value is None else Cell(value) for value in values)]
        for key, values in differing.items()
    ]
    return Table(["setting", *(str(folder.path) for folder in folders)], rows, names=True), shared


def _mean_cell(estimates: Estimates, row: str, length: int | None, kind: str) -> Cell:
    found = estimates.average(row, length, kind)
    if found is None:
        return NOTHING
    cell, have = _score_cell(estimates, row, found[1]), len(estimates.group.tasks(length, row))
    missing = len(estimates.group.tasks(length)) - have
    return Cell(f"{cell.text} of {have} tasks", cell.detail, cell.strong) if missing else cell


def _all_lengths(estimates: Estimates, row: str, kind: str) -> Cell:
    group = estimates.group
    weights: dict[tuple[int | None, str], float] = {}
    for length in group.lengths:
        found = estimates.average(row, length, kind)
        if found is None or group.tasks(length, row) != group.tasks(length):
            return NOTHING
        weights.update({where: weight / len(group.lengths) for where, weight in found[1].items()})
    return _score_cell(estimates, row, weights)


def _largest_drop(estimates: Estimates, row: str) -> Cell:
    drops = []
    for length in estimates.group.lengths:
        for task in estimates.group.tasks(length, row):
            if (drop := estimates.drop(row, {(length, task): 1.0})) is not None:
                drops.append((drop, f"{task} at {tokens(length)}" if length else task))
    if not drops:
        return NOTHING
    drop, where = max(drops, key=lambda pair: pair[0].value)
    return Cell(f"{number(drop.value)} {ends(drop)}", where) if drop.value > 0 else Cell("none")


def _score_cell(estimates: Estimates, row: str, weights: Weights) -> Cell:
    score, drop = estimates.score(row, weights), estimates.drop(row, weights)
    if drop is None:
        return Cell(number(score.value), ends(score))
    return Cell(number(score.value), f"drop {number(drop.value)} {ends(drop)}", _apart_from_zero(drop))


def _apart_from_zero(drop: Interval) -> bool:
    return drop.low > 0 or drop.high < 0
