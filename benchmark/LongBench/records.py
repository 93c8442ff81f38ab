"""Reads LongBench's samples: a folder of <dataset>.jsonl, a data.zip, or the hub's data.zip."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .catalog import METRIC

HUB_NAME = "THUDM/LongBench"
LAYOUT = (
    "a folder (or a zip file, or a folder `data` in either) of <dataset>.jsonl, for LongBench-E <dataset>_e.jsonl, "
    f"one JSON object a line: data.zip of the hub's dataset {HUB_NAME}, which is fetched where no data_path is given"
)
REFERENCE_NUMBER = {"retrieval": re.compile(r"Paragraph (\d+)"), "retrieval_zh": re.compile(r"段落(\d+)")}


@dataclass(frozen=True)
class Skipped:
    """A line that was left out, and what is wrong with it."""

    number: int
    problem: str


def read_dataset(
    data_path: str | Path | None, dataset: str, extended: bool = False, skip_bad: bool = False
) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """The records of a dataset in file order, and the lines that were left out.

    data_path: see LAYOUT; None fetches the hub's data.zip (once, into the hub's own cache).
    Raises FileNotFoundError where the data are not, ValueError with file and line number for a line that is not a
    record (`skip_bad` leaves it out instead) and for a file without any record.
    """
    name = f"{dataset}_e.jsonl" if extended else f"{dataset}.jsonl"
    records: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    with _open(Path(data_path) if data_path is not None else _fetch(), name) as (where, file):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = _parse(line, dataset)
                if record["_id"] in seen:
                    raise ValueError(f"_id: got {record['_id']!r} a second time, allowed: once")
            except ValueError as error:
                if not skip_bad:
                    raise ValueError(f"{where}, line {number}: {error} (--skip_bad leaves such lines out)") from None
                skipped.append(Skipped(number, str(error)))
                continue
            seen.add(record["_id"])
            records.append(record)
    if not records:
        raise ValueError(f"{where}: no record in it; expected {LAYOUT}")
    return records, skipped


def check_record(record: Any, dataset: str) -> None:
    """ValueError with key, value and what is allowed where `record` is not a sample of `dataset` (LongBench's schema:
    input, context, answers, length, dataset, language, all_classes, _id; further keys are let pass)."""
    if not isinstance(record, dict):
        raise ValueError(f"got {_short(record)}, allowed: a JSON object")
    for key in ("input", "context", "language", "_id"):
        _check(isinstance(record.get(key), str), record, key, "a text")
    _check(record.get("dataset") in (dataset, f"{dataset}_e"), record, "dataset", repr(dataset))
    length = record.get("length")
    _check(type(length) is int and length >= 0, record, "length", "an integer >= 0")
    _check(_texts(record.get("answers")), record, "answers", "a list of texts, at least one")
    classes = record.get("all_classes")
    if METRIC[dataset] == "classification":
        _check(_texts(classes), record, "all_classes", "a list of texts, at least one")
    else:
        _check(classes is None or isinstance(classes, list), record, "all_classes", "null or a list")
    pattern = REFERENCE_NUMBER.get(METRIC[dataset])
    if pattern is not None:
        stated = all(pattern.search(answer) for answer in record["answers"])
        _check(stated, record, "answers", f"texts that match {pattern.pattern!r}")


def _parse(line: bytes, dataset: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    check_record(record, dataset)
    return record


def _check(right: bool, record: dict[str, Any], key: str, allowed: str) -> None:
    if not right:
        given = f"got {_short(record[key])}" if key in record else "missing"
        raise ValueError(f"{key}: {given}, allowed: {allowed}")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def _open(path: Path, name: str) -> Iterator[tuple[str, IO[bytes]]]:
    """(how to name the file, its lines)"""
    if path.is_dir():
        for file in (path / name, path / "data" / name):
            if file.is_file():
                with open(file, "rb") as lines:
                    yield str(file), lines
                return
        raise FileNotFoundError(f"data_path: {path} has no {name}; expected {LAYOUT}")
    if not path.exists():
        raise FileNotFoundError(f"data_path: {path} does not exist; expected {LAYOUT}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"data_path: {path} is neither a folder nor a zip file; expected {LAYOUT}")
    with zipfile.ZipFile(path) as archive:
        members = [member for member in (name, f"data/{name}") if member in archive.namelist()]
        if not members:
            raise FileNotFoundError(f"data_path: {path} has no {name}; expected {LAYOUT}")
        with archive.open(members[0]) as content:
            yield f"{path}/{members[0]}", content


def _fetch() -> Path:
    from huggingface_hub import hf_hub_download  # takes a while to import

    try:
        return Path(hf_hub_download(HUB_NAME, "data.zip", repo_type="dataset"))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise FileNotFoundError(
            f"data.zip of {HUB_NAME} cannot be fetched ({type(error).__name__}: {reason}); give data_path: {LAYOUT}"
        ) from error
