"""What a choice for each head could save: python -m benchmark.index.per_head RESULTS.json --knob K --output FILE.json

Takes rows of benchmark.index that differ in one setting of a section (--knob; several times for several at once) and
asks what the same mean recall would cost if each query head had the row that suits it. The choice minimises mean keys
scored - price x mean recall over the heads' rows; the price is raised until the mean recall is the uniform row's,
between two choices linearly. "afterwards": chosen by the very queries that it is judged by, which no rule can: a bound
from above, which takes luck for skill. "from others": chosen by the other traces with the same rows, judged by this
one. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..command import exit_status
from ..results import check_writable, write_json
from .results import read_results

Array = np.ndarray


@dataclass(frozen=True)
class Choices:
    """Rows that differ in the knobs alone, on one trace: recall and keys scored [rows, heads], values of the knobs."""

    trace: str
    fixed: str
    values: Sequence[str]
    recall: Array
    keys: Array


def prices(recall: Array, keys: Array) -> Array:
    """One price between every two at which any head's best row changes, ascending, and one beyond each end."""
    rows = len(recall)
    first, second = np.triu_indices(rows, 1)
    dearer, better = keys[first] - keys[second], recall[first] - recall[second]
    slopes = np.unique((dearer / np.where(better == 0, np.inf, better)).round(9))
    at = np.concatenate([[0.0], slopes[slopes > 0]])
    return np.concatenate([[at[1] / 2] if len(at) > 1 else [0.0], (at[1:-1] + at[2:]) / 2, [2 * at[-1] + 1]])


def best_rows(recall: Array, keys: Array, price: float) -> Array:
    """For each head the row of least keys - price x recall, [heads]."""
    return (keys - price * recall).argmin(0)


def curve(chosen_by: tuple[Array, Array], judged_by: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Mean recall and mean keys of the choice at every price, by recall ascending, and the choices [points, heads]."""
    picks = np.stack([best_rows(*chosen_by, price) for price in prices(*chosen_by)])
    heads = np.arange(picks.shape[1])
    recall, keys = (table[picks, heads].mean(1) for table in judged_by)
    order = np.lexsort((keys, recall))
    return recall[order], keys[order], picks[order]


def keys_at(recall: Array, keys: Array, wanted: float) -> float | None:
    """Keys of a curve, ascending in recall, where it has the recall wanted; None where it does not reach so far."""
    if not recall[0] - 1e-9 <= wanted <= recall[-1] + 1e-9:
        return None
    return float(np.interp(wanted, recall, keys))


def compare(mine: Choices, others: Sequence[Choices]) -> list[dict[str, Any]]:
    """A row for each uniform choice: its mean recall and keys scored, and what choices for each head cost at that
    recall; keys None where they do not reach it. chosen: how many heads had which value."""
    own = (mine.recall, mine.keys)
    recall, keys, picks = curve(own, own)
    elsewhere = None
    if others:
        pooled = tuple(np.mean([getattr(each, name) for each in others], 0) for name in ("recall", "keys"))
        elsewhere = curve((pooled[0], pooled[1]), own)
    rows = []
    for at, value in enumerate(mine.values):
        wanted, uniform = float(mine.recall[at].mean()), float(mine.keys[at].mean())
        afterwards = keys_at(recall, keys, wanted)
        from_others = None if elsewhere is None else keys_at(*elsewhere[:2], wanted)
        nearest = picks[int(np.abs(recall - wanted).argmin())]
        counts = np.bincount(nearest, minlength=len(mine.values))
        rows.append(
            {
                "value": value,
                "recall": wanted,
                "uniform_keys": uniform,
                "afterwards_keys": afterwards,
                "afterwards_saves": None if afterwards is None else 1 - afterwards / uniform,
                "from_others_keys": from_others,
                "from_others_saves": None if from_others is None else 1 - from_others / uniform,
                "chosen": {mine.values[i]: int(count) for i, count in enumerate(counts) if count},
            }
        )
    return rows


def read_choices(results: Sequence[dict[str, Any]], knobs: Sequence[str], section: str) -> list[list[Choices]]:
    """Rows grouped by all that is not a knob; of each group the traces that have all its rows, each with them.

    Raises ValueError where there is no group of two rows with recall and keys scored by head.
    """
    groups: dict[str, dict[str, dict[str, tuple[Array, Array]]]] = defaultdict(lambda: defaultdict(dict))
    for row in results:
        graph = row["settings"].get(section, {})
        if not row.get("recall") or "keys_scored_by_head" not in row or not all(knob in graph for knob in knobs):
            continue
        # n_centroids and n_segment follow a trace's length, and no index of tokens reads them.
        settings = {key: value for key, value in row["settings"].items() if key not in ("n_centroids", "n_segment")}
        settings[section] = {key: value for key, value in graph.items() if key not in knobs}
        heads = [row["trace"].get("model"), row["layers"], row["kv_heads"], row["group"]]
        fixed = json.dumps([row["strategy"], settings, heads], sort_keys=True)
        value = "/".join(f"{graph[knob]}" for knob in knobs)
        tables = np.array(row["recall"]["by_head"], float).ravel(), np.array(row["keys_scored_by_head"], float).ravel()
        groups[fixed][row["trace"]["folder"]][value] = tables
    found = []
    for fixed, traces in groups.items():
        most = max(len(rows) for rows in traces.values())
        whole = {trace: rows for trace, rows in traces.items() if len(rows) == most > 1}
        if whole:
            names = list(next(iter(whole.values())))
            found.append(
                [_choices(trace, fixed, names, rows) for trace, rows in whole.items() if set(rows) == set(names)]
            )
    if not found:
        raise ValueError(
            f"results: no two rows that differ in {section}.{', '.join(knobs)} alone and have recall and keys scored "
            "by head; allowed: those of a sweep of it, with --metrics recall,bytes"
        )
    return found


def _choices(trace: str, fixed: str, names: Sequence[str], rows: dict[str, tuple[Array, Array]]) -> Choices:
    return Choices(trace, fixed, names, *(np.stack([rows[name][part] for name in names]) for part in (0, 1)))


def run(args: argparse.Namespace) -> str:
    """Checks everything, computes, writes the file and returns the table."""
    check_writable(args.output)
    results = [row for path in args.results for row in read_results(path)["rows"]]
    groups = read_choices(results, args.knob, args.section)
    seen = [json.loads(group[0].fixed)[1][args.section] for group in groups]
    records = []
    for group, settings in zip(groups, seen, strict=True):
        # What tells this group from the others.
        own = {key: value for key, value in settings.items() if any(other[key] != value for other in seen)}
        for mine in group:
            others = [other for other in group if other is not mine]
            records.append({"trace": mine.trace, "with": own, "rows": compare(mine, others)})
    of = {"results": [path.name for path in args.results], "knobs": [f"{args.section}.{knob}" for knob in args.knob]}
    write_json(args.output, {**of, "groups": records})
    return table(records, ", ".join(args.knob))


def table(records: Sequence[dict[str, Any]], knobs: str) -> str:
    """The records in Markdown."""
    lines = [
        f"| trace | with | {knobs} | recall | keys scored | per head, afterwards | per head, from others | chosen |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for record in records:
        told = ", ".join(f"{key} {value}" for key, value in record["with"].items())
        for row in record["rows"]:
            saved = [_keys(row, name) for name in ("afterwards", "from_others")]
            chosen = ", ".join(f"{count} x {value}" for value, count in row["chosen"].items())
            lines.append(
                f"| {record['trace']} | {told} | {row['value']} | {row['recall']:.4f} | {row['uniform_keys']:.0f} | "
                f"{saved[0]} | {saved[1]} | {chosen} |"
            )
    return "\n".join(lines)


def _keys(row: dict[str, Any], name: str) -> str:
    keys, saves = row[f"{name}_keys"], row[f"{name}_saves"]
    return "-" if keys is None else f"{keys:.0f} ({-100 * saves:+.1f} %)"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index.per_head",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("results", nargs="+", type=Path, help="files of python -m benchmark.index")
    add("--section", default="attention_aware_graph", help="of the configuration")
    add("--knob", action="append", required=True, help="key of the section, such as ef_search; may be repeated")
    add("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.index.per_head", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
