"""The rows of a results file as means over traces, by model and context length."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from config.schema import ESTIMATING

_COSTS = (
    "tokens_attended",
    "rows_estimated",
    "keys_scored",
    "bytes_read",
    "scoring_bytes",
    "index_bytes",
    "kv_bytes",
    "build_seconds",
)
_AGREEMENTS = ("recall", "mass", "mass_of_exact")
_NUMBER = re.compile(r"\b\d+(?:\.\d+)?\b")


@dataclass(frozen=True)
class Average:
    """A configuration on all its traces of a group. values: means over the traces of what each trace's row states, as
    error_median, recall, keys_scored .., and scored_share, of the context's tokens; of worst heads (error_worst,
    recall_worst ..) the worst trace's. What a row does not state is not in it. top_k: tokens retrieved per query head,
    where the strategy has such a number."""

    name: str
    series: str
    top_k: int
    traces: int
    values: dict[str, float]


@dataclass(frozen=True)
class Drawn:
    """How a configuration appears in a plot: in which series, and what stands beside its marker."""

    series: str
    label: str


@dataclass(frozen=True)
class Group:
    """Configurations on traces of one model and context length, in the file's order. tokens: mean length of the
    traces."""

    model: str
    context_len: int
    tokens: float
    traces: Sequence[str]
    averages: Sequence[Average]

    def drawn(self) -> list[Drawn]:
        """Of every configuration. Those of one series whose names differ in numbers alone are a family, labelled by
        these numbers. Where a series has several families each is a series of its own, called by the words that its
        names share, and one that has a single member needs no label."""
        families: dict[tuple[str, str], list[str]] = defaultdict(list)
        for average in self.averages:
            families[_family(average)].append(average.name)
        series, patterns = [each for each, _ in families], [each for _, each in families]
        drawn = []
        for average in self.averages:
            names = families[_family(average)]
            label = _own_numbers(average.name, names)
            if series.count(average.series) == 1:
                drawn.append(Drawn(average.series, label or average.name))
            else:
                ambiguous = patterns.count(_family(average)[1]) > 1
                drawn.append(Drawn(_common_words(names) + f" ({average.series})" * ambiguous, label))
        return drawn


def group_rows(rows: Sequence[dict[str, Any]]) -> list[Group]:
    """Raises ValueError where there are no rows."""
    if not rows:
        raise ValueError("results: got no rows, allowed: one or more")
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        trace = row["trace"]
        length = trace.get("prompt", {}).get("context_len", row["tokens"])
        groups[trace.get("model", "unknown model"), length].append(row)
    return [_group(*key, members) for key, members in sorted(groups.items())]


def _group(model: str, length: int, rows: Sequence[dict[str, Any]]) -> Group:
    by_configuration: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_configuration[json.dumps([row["name"], row["strategy"], row["set"]], sort_keys=True)].append(row)
    traces = list(dict.fromkeys(row["trace"]["folder"] for row in rows))
    tokens = sum(row["tokens"] for row in rows) / len(rows)
    return Group(model, length, tokens, traces, [_average(members) for members in by_configuration.values()])


def _average(rows: Sequence[dict[str, Any]]) -> Average:
    measured = [_values(row) for row in rows]
    values = {}
    for key in measured[0]:
        stated = [each[key] for each in measured if key in each]
        worst = max if key == "error_worst" else min if key.endswith("_worst") else None
        values[key] = worst(stated) if worst else sum(stated) / len(stated)
    return Average(rows[0]["name"], _series(rows[0]), _top_k(rows[0]), len(rows), values)


def _series(row: dict[str, Any]) -> str:
    """The strategy, with the estimation that was in force where it has one, whether its row or a default set it."""
    estimation = row["settings"]["attention_aware_graph"]["estimation"] if row["strategy"] in ESTIMATING else "none"
    return row["strategy"] + ("" if estimation == "none" else f" + {estimation}")


def _top_k(row: dict[str, Any]) -> int:
    """That of the strategy's own section, or of the graph's, which holds for all others."""
    own, graph = (
        row["settings"].get(section, {}).get("top_k") for section in (row["strategy"], "attention_aware_graph")
    )
    return own or graph or 0


def _values(row: dict[str, Any]) -> dict[str, float]:
    values = {key: float(row[key]) for key in _COSTS if key in row}
    if "keys_scored" in row:
        values["scored_share"] = row["keys_scored"] / row["tokens"]
    if error := row.get("output_error"):
        values |= {f"error_{key}": error[key] for key in ("median", "mean", "p90")}
        values["error_worst"] = error["worst_head"]
    for key in _AGREEMENTS:
        if agreement := row.get(key):
            values |= {key: agreement["mean"], f"{key}_worst": agreement["worst_head"]}
    return values


def _family(average: Average) -> tuple[str, str]:
    return average.series, _NUMBER.sub("#", average.name)


def _varying(names: Sequence[str]) -> list[bool]:
    """Of each number in names that differ in numbers alone, whether it is another one in some of them."""
    return [len(set(numbers)) > 1 for numbers in zip(*map(_NUMBER.findall, names), strict=True)]


def _own_numbers(name: str, names: Sequence[str]) -> str:
    """Those that are not the same in all `names` of a family; empty where all are."""
    return ", ".join(number for number, varies in zip(_NUMBER.findall(name), _varying(names), strict=True) if varies)


def _common_words(names: Sequence[str]) -> str:
    """A family's name, with an ellipsis in place of what varies."""
    varying = iter(_varying(names))
    return _NUMBER.sub(lambda number: "\N{HORIZONTAL ELLIPSIS}" if next(varying) else number[0], names[0])
