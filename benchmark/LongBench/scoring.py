"""Scores of datasets and of the whole benchmark from records: {"pred", "expected", "all_classes", "length", ..}."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .catalog import CATEGORIES, E_BUCKETS, E_DATASETS, ENGLISH_AND_CODE, FIRST_LINE_ONLY, METRIC
from .metrics import METRICS

Record = Mapping[str, Any]


def sample_scores(dataset: str, records: Sequence[Record]) -> list[float]:
    """0 to 100 for each record: the best over its references, of the first line only where LongBench says so.

    As upstream, every record is scored with the classes of the last one, although each record keeps its own.
    """
    return [100 * share for share in _shares(dataset, records)]


def score_dataset(dataset: str, records: Sequence[Record]) -> float:
    """LongBench's score of a dataset: mean of `sample_scores`, two decimals. Raises ValueError without records."""
    if not records:
        raise ValueError(f"{dataset}: got no records to score")
    return round(100 * sum(_shares(dataset, records)) / len(records), 2)


def score_buckets(dataset: str, records: Sequence[Record]) -> dict[str, float]:
    """LongBench-E's scores of a dataset by length, {"0-4k": .., "4-8k": .., "8k+": ..}; NaN for an empty bucket."""
    buckets: dict[str, list[float]] = {name: [] for name in E_BUCKETS}
    for record, share in zip(records, _shares(dataset, records), strict=True):
        buckets[bucket_of(record["length"])].append(share)
    # numpy's mean and rounding, as upstream: they differ from Python's in the last digit
    return {name: float(round(100 * np.mean(shares), 2)) if shares else math.nan for name, shares in buckets.items()}


def bucket_of(length: int) -> str:
    """LongBench-E's bucket of a record's `length`."""
    return next(name for name, (low, high) in E_BUCKETS.items() if low <= length and (high is None or length < high))


@dataclass(frozen=True)
class Average:
    """A mean, what it is the mean of, and the datasets that belong to it but had no score. `score` is None where
    nothing had one."""

    label: str
    score: float | None
    of: dict[str, float]
    missing: list[str]


def averages(scores: Mapping[str, float]) -> list[Average]:
    """Both means in use: of the six category means (LongBench's README), and of the 16 English and code datasets (most
    KV cache papers). A category's mean is of its datasets that have a score; a category without one is left out."""
    means = {}
    for category, datasets in CATEGORIES.items():
        present = [scores[name] for name in datasets if name in scores]
        if present:
            means[category] = sum(present) / len(present)
    everything = [name for datasets in CATEGORIES.values() for name in datasets]
    return [
        _average("mean of the six category means (21 datasets)", means, [n for n in everything if n not in scores]),
        _plain_mean("mean of the 16 English and code datasets", ENGLISH_AND_CODE, scores),
    ]


def bucket_averages(scores: Mapping[str, Mapping[str, float]]) -> list[Average]:
    """Mean of LongBench-E's 13 datasets in each bucket; a dataset whose bucket is empty counts as missing."""
    found = []
    for bucket in E_BUCKETS:
        present = {name: by[bucket] for name, by in scores.items() if not math.isnan(by[bucket])}
        found.append(_plain_mean(f"mean of the 13 LongBench-E datasets, {bucket}", E_DATASETS, present))
    return found


def _shares(dataset: str, records: Sequence[Record]) -> list[float]:
    """0 to 1 for each record."""
    metric = METRICS[METRIC[dataset]]
    classes = records[-1]["all_classes"] if records else None
    shares = []
    for record in records:
        prediction = record["pred"]
        if dataset in FIRST_LINE_ONLY:
            prediction = prediction.lstrip("\n").split("\n")[0]
        shares.append(max((metric(prediction, answer, classes) for answer in record["expected"]), default=0.0))
    return shares


def _plain_mean(label: str, datasets: Sequence[str], scores: Mapping[str, float]) -> Average:
    present = {name: scores[name] for name in datasets if name in scores}
    return _average(label, present, [name for name in datasets if name not in scores])


def _average(label: str, parts: Mapping[str, float], missing: list[str]) -> Average:
    rounded = {name: round(score, 2) for name, score in parts.items()}
    score = round(sum(parts.values()) / len(parts), 2) if parts else None
    return Average(label, score, rounded, missing)
