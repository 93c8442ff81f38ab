"""How far strategies agree with full attention: scores and texts, dataset by dataset, in one table.

python -m benchmark.LongBench.compare RECORDS, where RECORDS is a folder of the runner (<strategy>/<dataset>.jsonl).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark.results import write_json

from .catalog import METRIC
from .evaluation import finished_records
from .metrics import require_packages, rouge, rouge_zh
from .scoring import score_dataset

Record = Mapping[str, Any]
REFERENCE = "full"


@dataclass(frozen=True)
class Agreement:
    """A strategy beside full attention on one dataset, or on all of them (means over datasets; samples are added up).

    difference: score less full's, in points. rouge_l: rouge-L f of the strategy's text against full's, 0 to 1.
    same_prefix: characters before the first difference as a share of the longer text. identical: share of samples.
    answered: samples to which full attention's answer is not blank, same_answer: how many of these have the same text;
    two blank answers agree too, and say nothing.
    """

    strategy: str
    dataset: str
    samples: int
    full: float
    score: float
    difference: float
    rouge_l: float
    same_prefix: float
    identical: float
    answered: int
    same_answer: int


def similarity(text: str, other: str, language: str) -> float:
    """Rouge-L f of two texts, 0 to 1, of jieba's tokens where language is "zh"; 1 where both are empty."""
    if text == other:
        return 1.0
    return (rouge_zh if language == "zh" else rouge)(text, other)


def same_prefix(text: str, other: str) -> float:
    """Length of the common beginning as a share of the longer text, 0 to 1; 1 where both are empty."""
    longer = max(len(text), len(other))
    pairs = enumerate(zip(text, other, strict=False))
    first_difference = next((at for at, (one, another) in pairs if one != another), min(len(text), len(other)))
    return first_difference / longer if longer else 1.0


def compare_dataset(dataset: str, strategy: str, records: Sequence[Record], full: Sequence[Record]) -> Agreement:
    """Agreement on one dataset. Raises ValueError where the two do not hold the same samples."""
    if [record["id"] for record in records] != [record["id"] for record in full]:
        raise ValueError(f"{dataset}: {strategy} and {REFERENCE} hold different samples; run both in one folder")
    texts = [(record["pred"], other["pred"], other["language"]) for record, other in zip(records, full, strict=True)]
    score, reference = score_dataset(dataset, records), score_dataset(dataset, full)
    count, answered = len(texts), [text == other for text, other, _ in texts if other.strip()]
    return Agreement(
        strategy,
        dataset,
        count,
        reference,
        score,
        round(score - reference, 2),
        sum(similarity(*pair) for pair in texts) / count,
        sum(same_prefix(text, other) for text, other, _ in texts) / count,
        sum(text == other for text, other, _ in texts) / count,
        len(answered),
        sum(answered),
    )


def compare(records: Mapping[str, Mapping[str, Sequence[Record]]]) -> list[Agreement]:
    """Every strategy beside full attention on the datasets that both have, then its mean over them.

    records: by strategy and dataset. Raises ValueError where full attention is missing.
    """
    if REFERENCE not in records:
        raise ValueError(f"strategies: got {', '.join(records) or 'none'}, allowed: {REFERENCE} among them")
    full = records[REFERENCE]
    rows: list[Agreement] = []
    for strategy, by_dataset in records.items():
        shared = [dataset for dataset in full if dataset in by_dataset]
        if strategy == REFERENCE or not shared:
            continue
        of_strategy = [compare_dataset(name, strategy, by_dataset[name], full[name]) for name in shared]
        rows += [*of_strategy, _mean(of_strategy)]
    return rows


def table(rows: Sequence[Agreement]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| strategy | dataset | samples | full | score | difference | rouge-L f | same prefix | identical "
        "| where answered |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.strategy} | {row.dataset} | {row.samples} | {row.full:.2f} | {row.score:.2f} | "
            f"{row.difference:+.2f} | {row.rouge_l:.3f} | {row.same_prefix:.3f} | {row.identical:.0%} | "
            f"{row.same_answer} of {row.answered} |"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="folder of the runner: <strategy>/<dataset>.jsonl")
    parser.add_argument("--output", type=Path, help="JSON file for the rows, with the run's protocol and environment")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        records = finished_records(args.records)
        require_packages([METRIC[name] for by_dataset in records.values() for name in by_dataset] + ["rouge_zh"])
        rows = compare(records)
        if args.output is not None:
            write_json(args.output, {**_told(args.records), "rows": [asdict(row) for row in rows]})
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def _told(folder: Path) -> dict[str, Any]:
    """Protocol and environment of the runner's results, where they are there."""
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {key: results[key] for key in ("config", "environment") if key in results}


def _mean(rows: Sequence[Agreement]) -> Agreement:
    values = ("full", "score", "difference", "rouge_l", "same_prefix", "identical")
    means = {name: sum(getattr(row, name) for row in rows) / len(rows) for name in values}
    counts = {name: sum(getattr(row, name) for row in rows) for name in ("samples", "answered", "same_answer")}
    return Agreement(rows[0].strategy, f"mean of {len(rows)}", **means, **counts)


if __name__ == "__main__":
    sys.exit(main())
