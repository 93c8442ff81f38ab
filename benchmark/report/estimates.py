"""Scores and drops against full attention with their intervals, of one task or of a weighted mean of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmark.LongBench.catalog import CATEGORIES, DATASETS, ENGLISH_AND_CODE

from .bootstrap import Interval, interval, resampled_means
from .groups import Group, is_full

Weights = Mapping[tuple[int | None, str], float]  # by length and task


@dataclass(frozen=True)
class Average:
    """A mean in use for a benchmark: what it is the mean of, and the weight of every task, 1 in all."""

    label: str
    weights: dict[str, float]


def averages(benchmark: str, tasks: list[str]) -> dict[str, Average]:
    """The means over tasks that a benchmark's users report, by a short name.

    RULER and any other benchmark: of all tasks. LongBench: of the category means (its README), and of the 16 English
    and code datasets (most KV cache papers); a category or dataset without a result is left out, and the label says so.
    """
    if benchmark.lower() != "longbench" or not set(tasks) <= set(DATASETS):
        return {"tasks": Average(f"mean of {_count(len(tasks), 'task')}", {task: 1 / len(tasks) for task in tasks})}
    found = {}
    present = [[name for name in names if name in tasks] for names in CATEGORIES.values()]
    present = [names for names in present if names]
    weights = {name: 1 / len(present) / len(names) for names in present for name in names}
    of = f"{_of(len(present), len(CATEGORIES))} category means ({_of(len(tasks), len(DATASETS))} datasets)"
    found["categories"] = Average(f"mean of {of}", weights)
    if english := [name for name in ENGLISH_AND_CODE if name in tasks]:
        label = f"mean of {_of(len(english), len(ENGLISH_AND_CODE))} English and code datasets"
        found["english"] = Average(label, {name: 1 / len(english) for name in english})
    return found


def _of(present: int, known: int) -> str:
    return str(known) if present == known else f"{present} of {known}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


class Estimates:
    """All scores and drops of a group. The draws of a task and length are made once, for all rows that have the same
    number of samples."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._draws: dict[tuple[str, int | None, str], NDArray[np.float64]] = {}
        alike: dict[tuple[int | None, str, int], list[str]] = {}
        for (row, length, task), entry in group.entries.items():
            alike.setdefault((length, task, len(entry.scores)), []).append(row)
        for (length, task, count), rows in alike.items():
            scores = np.stack([group.entries[row, length, task].scores for row in rows], axis=1)
            means = resampled_means(scores, f"{length}/{task}/{count}")
            self._draws.update({(row, length, task): means[:, i] for i, row in enumerate(rows)})

    def score(self, row: str, weights: Weights) -> Interval:
        """The weighted mean of a row's scores, 0 to 100."""
        return interval(self._mean(row, weights), self._mean_draws(row, weights))

    def drop(self, row: str, weights: Weights) -> Interval | None:
        """Full attention's weighted mean less the row's, on the same samples, in points; positive where the row lost.
        None for full attention itself, and where a task has no full attention to compare with."""
        if is_full(row) or any((row, *where) not in self.group.base for where in weights):
            return None
        value, draws = 0.0, np.zeros(1)
        for where, weight in weights.items():
            part, base = {where: weight}, self.group.base[(row, *where)]
            value += self._mean(base, part) - self._mean(row, part)
            draws = draws + self._mean_draws(base, part) - self._mean_draws(row, part)
        return interval(value, draws)

    def difference(self, row: str, other: str, weights: Weights) -> Interval | None:
        """A row's weighted mean less another's, on the same samples, in points. None where the other lacks a task or
        was run on another number of samples."""
        for where in weights:
            entries = self.group.entries.get((row, *where)), self.group.entries.get((other, *where))
            if entries[0] is None or entries[1] is None or len(entries[0].scores) != len(entries[1].scores):
                return None
        value = self._mean(row, weights) - self._mean(other, weights)
        return interval(value, self._mean_draws(row, weights) - self._mean_draws(other, weights))

    def averages(self, length: int | None) -> dict[str, Average]:
        """The benchmark's means over the tasks that any row has at a length."""
        return averages(self.group.benchmark, self.group.tasks(length))

    def average(self, row: str, length: int | None, kind: str) -> tuple[Average, Weights] | None:
        """The mean `kind` over the row's tasks at a length; None where it has none."""
        tasks = self.group.tasks(length, row)
        found = averages(self.group.benchmark, tasks).get(kind) if tasks else None
        return (found, {(length, task): weight for task, weight in found.weights.items()}) if found else None

    def _mean(self, row: str, weights: Weights) -> float:
        return sum(weight * float(self.group.entries[(row, *where)].scores.mean()) for where, weight in weights.items())

    def _mean_draws(self, row: str, weights: Weights) -> NDArray[np.float64]:
        return sum((weight * self._draws[(row, *where)] for where, weight in weights.items()), start=np.zeros(1))
