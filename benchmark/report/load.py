"""Reads results folders of benchmark.runner and says what is wrong with them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COSTS = ("attended_share", "estimated_share", "scored_share", "index_bytes", "kv_bytes", "recall", "mass")


@dataclass(frozen=True)
class Entry:
    """A task under a strategy. scores: float64 [samples], 0 to 100. costs: means over the samples, those of COSTS that
    were measured. samples: (id, references) of every sample, None where the folder holds no records."""

    scores: NDArray[np.float64]
    costs: dict[str, float]
    samples: list[tuple[str, Any]] | None

    def same(self, other: Entry) -> bool:
        """Whether scores and costs are the other's."""
        return np.array_equal(self.scores, other.scores) and self.costs == other.costs

    def differing_samples(self, other: Entry) -> str | None:
        """How the samples differ from the other's, None where they do not (as far as the folders tell)."""
        if len(self.scores) != len(other.scores):
            return f"{len(self.scores)} samples against {len(other.scores)}"
        for number, (mine, theirs) in enumerate(zip(self.samples or [], other.samples or [], strict=False), 1):
            if mine != theirs:
                return f"sample {number} is {mine[0]!r} {mine[1]!r} against {theirs[0]!r} {theirs[1]!r}"
        return None


@dataclass(frozen=True)
class Folder:
    """A results folder. length: context length in tokens, None for a benchmark without one. results: by strategy and
    task, both in the file's order."""

    path: Path
    benchmark: str
    model: str
    length: int | None
    protocol: dict[str, Any]
    environment: dict[str, Any]
    results: dict[str, dict[str, Entry]]

    @property
    def file(self) -> Path:
        return self.path / "results.json"


def read_folder(path: Path) -> Folder:
    """The content of `path`/results.json, and the samples of the records beside it.

    Raises FileNotFoundError without that file, ValueError naming file, strategy and task for what is not a result, and
    for strategies of one folder that were scored on different samples.
    """
    file = path / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no results.json in it; allowed: folders that benchmark.runner has finished")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: damaged JSON ({error})") from None
    _check(isinstance(content, dict), file, f"got {type(content).__name__}, allowed: an object")
    for key in ("config", "environment", "results"):
        _check(isinstance(content.get(key), dict), file, f"{key}: got {content.get(key)!r}, allowed: an object")
    protocol, results = content["config"], content["results"]
    for key in ("benchmark", "model"):
        _check(isinstance(protocol.get(key), str), file, f"config.{key}: got {protocol.get(key)!r}, allowed: a name")
    length = protocol.get("length")
    needed = length is not None or protocol["benchmark"].lower() == "ruler"
    known = isinstance(length, int) and not isinstance(length, bool) and length > 0
    _check(known or not needed, file, f"config.length: got {length!r}, allowed: the context length in tokens")
    found: dict[str, dict[str, Entry]] = {}
    for strategy, by_task in results.items():
        _check(isinstance(by_task, dict), file, f"results.{strategy}: got {by_task!r}, allowed: an object by task")
        if by_task:
            found[strategy] = {
                task: _entry(file, strategy, task, entry, _samples(path / strategy / f"{task}.jsonl"))
                for task, entry in by_task.items()
            }
    _check(bool(found), file, "results: got no finished task, allowed: at least one")
    _check_samples(file, found)
    environment = content["environment"]
    return Folder(path, protocol["benchmark"], protocol["model"], length, protocol, environment, found)


def _entry(file: Path, strategy: str, task: str, entry: Any, samples: list[tuple[str, Any]] | None) -> Entry:
    where = f"strategy {strategy}, task {task}"
    _check(isinstance(entry, dict), file, f"{where}: got {entry!r}, allowed: an object")
    scores = entry.get("scores")
    right = isinstance(scores, list) and bool(scores) and all(_is_number(s) and 0 <= s <= 100 for s in scores)
    _check(right, file, f"{where}: scores: got {_short(scores)}, allowed: a number from 0 to 100 for each sample")
    count = len(scores)
    stated = entry.get("samples", count)
    _check(stated == count, file, f"{where}: samples: got {stated!r} beside {count} scores, allowed: as many")
    if samples is not None and len(samples) != count:
        raise ValueError(
            f"{file}: {where}: got {count} scores beside {len(samples)} records in {strategy}/{task}.jsonl"
        )
    costs = {}
    for key in COSTS:
        if (value := entry.get(key)) is not None:
            _check(_is_number(value) and value >= 0, file, f"{where}: {key}: got {value!r}, allowed: a number >= 0")
            costs[key] = float(value)
    return Entry(np.array(scores, dtype=np.float64), costs, samples)


def _samples(records: Path) -> list[tuple[str, Any]] | None:
    if not records.is_file():
        return None
    samples = []
    for number, line in enumerate(records.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            samples.append((record["id"], record["expected"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{records}, line {number}: not a record ({type(error).__name__}: {error})") from None
    return samples


def _check_samples(file: Path, results: dict[str, dict[str, Entry]]) -> None:
    first: dict[str, tuple[str, Entry]] = {}
    for strategy, by_task in results.items():
        for task, entry in by_task.items():
            other, reference = first.setdefault(task, (strategy, entry))
            if told := entry.differing_samples(reference):
                raise ValueError(f"{file}: task {task}: {strategy} and {other} have different samples ({told})")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check(right: bool, file: Path, message: str) -> None:
    if not right:
        raise ValueError(f"{file}: {message}")
