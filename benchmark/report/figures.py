"""A group's numbers as plots."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np

from . import plots
from .blocks import Image
from .estimates import Estimates
from .groups import Group
from .tables import mean_costs
from .text import tokens

# with more markers only the shortest and the longest context of each row are labelled
MARKERS_LABELLED = 24


def score_against_cost(estimates: Estimates) -> Image | None:
    """Mean score against index bytes and the KV bytes that a step reads, a marker for each row and length;
    None without costs."""
    group, points = estimates.group, []
    labels = set()
    crowded = len(group.rows) * len(group.lengths) > MARKERS_LABELLED
    for row, length in itertools.product(group.rows, group.lengths):
        kind = next(iter(estimates.averages(length)))
        if (found := estimates.average(row, length, kind)) is None:
            continue
        means = mean_costs(group, row, length)
        units = {"index_share": 0.01, "read_bytes": 2**20}
        x = tuple(means[key] / unit if key in means else None for key, unit in units.items())
        if any(value is not None for value in x):
            labels.add(found[0].label)
            label = "" if crowded and length not in (group.lengths[0], group.lengths[-1]) else tokens(length) or row
            points.append(plots.Point(x, estimates.score(row, found[1]).value, label, row))
    if not points:
        return None
    y_title = f"{group.name} score\n{labels.pop() if len(labels) == 1 else 'mean of the tasks'}"
    x_titles = ("index bytes / KV cache bytes (%)", "keys and values read per decode step (MiB)")
    png = plots.against_cost(x_titles, y_title, points, (False, True))
    alt = f"{group.name}, {group.model}: mean score against index bytes and against KV bytes read"
    return Image(_file("cost", group), png, alt)


def heatmaps(estimates: Estimates) -> list[Image]:
    """Tasks against lengths for every row, or against the rows where there is one length."""
    group, lengths = estimates.group, estimates.group.lengths
    if len(lengths) == 1:
        pairs = [(row, lengths[0]) for row in group.rows]
        title = group.name + (f" at {lengths[0]:,} tokens" if lengths[0] else "")
        return [_heatmap(estimates, title, pairs, group.rows, _file("tasks", group))]
    return [
        _heatmap(
            estimates,
            row,
            [(row, length) for length in lengths],
            [tokens(length) for length in lengths],
            _file("tasks", group, row),
        )
        for row in group.rows
    ]


def _heatmap(
    estimates: Estimates, title: str, pairs: Sequence[tuple[str, int | None]], columns: Sequence[str], file: str
) -> Image:
    group = estimates.group
    tasks = list(dict.fromkeys(task for length in group.lengths for task in group.tasks(length)))
    kinds = list(dict.fromkeys(kind for length in group.lengths for kind in estimates.averages(length)))
    scores = np.full((len(tasks) + len(kinds), len(pairs)), np.nan)
    drops = scores.copy()
    for column, (row, length) in enumerate(pairs):
        here = [{(length, task): 1.0} if (row, length, task) in group.entries else None for task in tasks]
        means = [found[1] if (found := estimates.average(row, length, kind)) else None for kind in kinds]
        for line, weights in enumerate([*here, *means]):
            if weights is not None:
                scores[line, column] = estimates.score(row, weights).value
                if (drop := estimates.drop(row, weights)) is not None:
                    drops[line, column] = drop.value
    panels = [plots.Panel("score", columns, scores, False)]
    compared = np.isfinite(drops).any(axis=0)
    if compared.any():
        names = list(itertools.compress(columns, compared))
        panels.append(plots.Panel("drop against full (points)", names, drops[:, compared], True))
    named = {"tasks": "mean", "categories": "mean of categories", "english": "mean of English, code"}
    lines = [*tasks, *(named[kind] for kind in kinds)]
    png = plots.heatmap(title, lines, panels, len(kinds))
    return Image(file, png, f"{group.name}, {group.model}, {title}: score and drop of every task")


def _file(*parts: str | Group) -> str:
    names = [f"{part.benchmark}-{part.model}" if isinstance(part, Group) else part for part in parts]
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(names)).strip("-") + ".png"
