"""The outcome of a run as one JSON file and as Markdown: scores, averages, what was missing, how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .catalog import E_BUCKETS
from .compare import REFERENCE, Agreement, compare, table
from .evaluation import finished_records, lines_left_out
from .metrics import scorer_versions
from .scoring import averages, bucket_averages, score_buckets, score_dataset

STATED = (
    "benchmark",
    "model",
    "lora",
    "dtype",
    "protocol",
    "template",
    "truncation",
    "stop",
    "sampling",
    "samples",
    "budget",
)


def summarise(folder: Path, extended: bool = False) -> dict[str, Any]:
    """Scores of the finished datasets of every strategy in a runner's folder, both averages, and the agreement with
    full attention where that ran. A LongBench-E bucket without samples is null."""
    records = finished_records(folder)
    scored = {}
    for strategy, by_dataset in records.items():
        if extended:
            buckets = {name: score_buckets(name, lines) for name, lines in by_dataset.items()}
            scores: dict[str, Any] = {name: _without_nan(by_bucket) for name, by_bucket in buckets.items()}
            means = bucket_averages(buckets)
        else:
            scores = {name: score_dataset(name, lines) for name, lines in by_dataset.items()}
            means = averages(scores)
        scored[strategy] = {
            "scores": scores,
            "averages": [asdict(mean) for mean in means],
            "samples": {name: len(lines) for name, lines in by_dataset.items()},
            "truncated": {name: sum(line["truncated"] for line in lines) for name, lines in by_dataset.items()},
        }
    return {
        "config": json.loads((folder / "protocol.json").read_text(encoding="utf-8")),
        "scorers": scorer_versions(),
        "strategies": scored,
        "lines_left_out": lines_left_out(folder),
        "agreement": [asdict(row) for row in compare(records)] if REFERENCE in records else [],
    }


def report(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown: protocol, scores, averages with what is missing, agreement."""
    stated = [f"- {key}: {summary['config'][key]}" for key in STATED if key in summary["config"]]
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in summary["scorers"].items())
    left_out = [
        f"- left out of {name}: line {', '.join(str(line['number']) for line in lines)}"
        for name, lines in summary["lines_left_out"].items()
    ]
    parts = ["\n".join([*stated, f"- scorers: {versions}", *left_out])]
    if not summary["strategies"]:
        return "\n\n".join([*parts, "No dataset is finished yet: other processes are at work on the rest."])
    parts.append(_score_table(summary["strategies"]))
    if summary["agreement"]:
        parts.append(table([Agreement(**row) for row in summary["agreement"]]))
    return "\n\n".join(parts)


def _score_table(strategies: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for scored in strategies.values() for name in scored["scores"]))
    lines = [f"| dataset | samples (cut) | {' | '.join(strategies)} |", "|---|---:|" + "---:|" * len(strategies)]
    for name in names:
        having = [scored for scored in strategies.values() if name in scored["scores"]]
        samples = f"{having[0]['samples'][name]} ({having[0]['truncated'][name]})"
        cells = [_cell(scored["scores"].get(name)) for scored in strategies.values()]
        lines.append(f"| {name} | {samples} | {' | '.join(cells)} |")
    missing: dict[str, list[str]] = {}
    labels = [mean["label"] for mean in next(iter(strategies.values()))["averages"]]
    for place, label in enumerate(labels):
        means = [scored["averages"][place] for scored in strategies.values()]
        lines.append(f"| **{label}** | | {' | '.join(_cell(mean['score']) for mean in means)} |")
        for strategy, mean in zip(strategies, means, strict=True):
            if mean["missing"]:
                missing.setdefault(f"{label} is without {', '.join(mean['missing'])}", []).append(strategy)
    notes = (f"\n{note} ({', '.join(names)})" for note, names in missing.items())
    return "\n".join([*lines, *notes])


def _cell(score: Any) -> str:
    if isinstance(score, Mapping):
        return " / ".join(_cell(score[bucket]) for bucket in E_BUCKETS)
    return "-" if score is None else f"{score:.2f}"


def _without_nan(by_bucket: Mapping[str, float]) -> dict[str, float | None]:
    return {bucket: None if math.isnan(score) else score for bucket, score in by_bucket.items()}
