"""What the report says, in its order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .blocks import Block, Heading, Images, Paragraph
from .bootstrap import LEVEL, RESAMPLES, SEED
from .estimates import Estimates
from .figures import heatmaps, score_against_cost
from .groups import Group, is_full
from .plots import DROP_COLOURS_END
from .tables import costs, made_with, overview, tasks_at
from .text import tokens

TITLE = "Retrieval strategies: scores and costs"


def document(groups: Sequence[Group]) -> list[Block]:
    """The whole report."""
    blocks: list[Block] = [
        Heading(1, TITLE),
        Paragraph(
            "Scores are 0 to 100. Drop: points that a strategy lost against full attention on the same samples; a "
            f"negative drop is a gain. In brackets: {100 * LEVEL:.0f} % percentile bootstrap intervals over the "
            f"samples within each task ({RESAMPLES:,} resamples, seed {SEED}); those of drops are paired: full "
            "attention and strategy are resampled alike. For a mean every task is resampled by itself. A drop is bold "
            "where its interval leaves out 0, without correction for the number of cells. An interval of width 0 says "
            "that all samples agree, not that more of them would."
        ),
    ]
    for group in groups:
        blocks += _group(group)
    return blocks


def _group(group: Group) -> list[Block]:
    estimates = Estimates(group)
    lengths = group.lengths
    counts = sorted({len(entry.scores) for entry in group.entries.values()})
    samples = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    labels = dict.fromkeys(average.label for length in lengths for average in estimates.averages(length).values())
    blocks: list[Block] = [
        Heading(2, f"{group.name}, {group.model}"),
        *_warnings(group),
        Heading(3, "Means by context length" if lengths != [None] else "Means"),
        Paragraph(f"Score: {'; '.join(labels)}. Samples a task: {samples}."),
        overview(estimates),
    ]
    if image := score_against_cost(estimates):
        blocks += [Heading(3, "Score against memory and bytes read"), Images([image])]
    blocks += [
        Heading(3, "Tasks by context length" if len(lengths) > 1 else "Tasks"),
        Paragraph("Darker blue: higher score." + _DROP_COLOURS * bool(group.base)),
        Images(heatmaps(estimates)),
    ]
    for length in lengths:
        blocks += [
            Heading(3, f"Tasks at {length:,} tokens" if length else "Tasks in numbers"),
            tasks_at(estimates, length),
        ]
    if (table := costs(group)) is not None:
        blocks += [Heading(3, "Costs"), Paragraph(_COSTS), table]
    differing, shared = made_with(group.folders)
    blocks.append(Heading(3, "Protocol, hardware and versions"))
    if differing is not None:
        blocks += [Paragraph("Settings that differ between the folders:"), differing]
    return [*blocks, Paragraph("Settings of all folders:" if len(group.folders) > 1 else "Settings:"), shared]


_DROP_COLOURS = f" Brown: points lost; light blue: points gained. These colours end at {DROP_COLOURS_END} points."
_COSTS = (
    "Means over tasks, samples, layers, heads and decode steps. Tokens attended: per kv head; keys scored: inner "
    "products of the search per query head; clusters read: those that stand for other tokens, per kv head; all as a "
    "share of the context. KV read a step: keys and values of the tokens attended and of the clusters read, over all "
    "layers and kv heads, without what the search reads. Recall: share of the exact top k that was "
    "retrieved. Attention mass: share of full attention's softmax weight that the attended tokens hold."
)


def _warnings(group: Group) -> list[Block]:
    found: list[Block] = []
    if group.mixed:
        told = ", ".join(group.mixed)
        found.append(
            Paragraph(f"These tables mix protocols: {told} differ between the folders (see the end).", warning=True)
        )
    found += [Paragraph(f"{letter}: {way}.", warning=True) for letter, way in group.variants.items()]
    if not any(map(is_full, group.rows)):
        found.append(Paragraph("Full attention was not run: scores only, no drops.", warning=True))
    elif any(key not in group.base for key in group.entries):
        alone = {f"{t} at {tokens(l)}" if l else t: None for r, l, t in group.entries if (r, l, t) not in group.base}
        found.append(Paragraph(f"No full attention on the same samples for: {', '.join(alone)}.", warning=True))
    lacking_rows: dict[str, list[str]] = {}
    for row, length in itertools.product(group.rows, group.lengths):
        present = group.tasks(length, row)
        if present and (missing := [task for task in group.tasks(length) if task not in present]):
            where = f" at {tokens(length)}" if length else ""
            lacking_rows.setdefault(f"{', '.join(missing)}{where}", []).append(row)
    for lacking, rows in lacking_rows.items():
        told = f"Without {lacking}: {', '.join(rows)}; their means are of the other tasks."
        found.append(Paragraph(told, warning=True))
    return found
