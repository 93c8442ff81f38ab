"""RULER's data files, data/<task>/validation.jsonl: written once, read again by runs of the same protocol."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..results import write_text
from ..runner import keep_protocol

FIELDS = ("newer", "older")
FILE = "validation.jsonl"
Rows = list[dict[str, Any]]


def kept_rows(
    folder: Path, protocol: dict[str, Any], make: Callable[[], Rows], fields: str = "newer", skip_bad: bool = False
) -> Rows:
    """The rows in folder/validation.jsonl, which are made and written where they are missing; folder/protocol.json
    states how.

    fields: "newer" as `make` gives them; "older": {index, input with the answer prefix, outputs, length}.
    Raises ValueError for a folder of another protocol, or whose file was not written by us, and as read_rows.
    """
    path = folder / FILE
    if not path.exists():
        rows = make()
        keep_protocol(folder, {**protocol, "fields": fields, "rows": len(rows)})
        written = [older_fields(row) for row in rows] if fields == "older" else rows
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
        return rows
    if not (folder / "protocol.json").exists():
        raise ValueError(f"{path} was not made by this program (no protocol.json beside it); use it with --data_path")
    rows_then = json.loads((folder / "protocol.json").read_text(encoding="utf-8")).get("rows")
    keep_protocol(folder, {**protocol, "fields": fields, "rows": rows_then})
    rows = read_rows(path, skip_bad)
    if len(rows) != rows_then and not skip_bad:
        raise ValueError(
            f"{path} has {len(rows)} lines, protocol.json says {rows_then}; remove both to make them again"
        )
    return rows


def older_fields(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the fields that RULER's files had before mid-2025."""
    prompt = row["input"] + row["answer_prefix"]
    return {"index": row["index"], "input": prompt, "outputs": row["outputs"], "length": row["length"]}


def read_rows(path: Path, skip_bad: bool = False) -> Rows:
    """Rows of a data file, upstream's too, older or newer: {"input", "outputs", "answer_prefix", ..}.

    `index` becomes the place in the file, as upstream's niah files state other numbers there. Raises FileNotFoundError
    where the file is missing, ValueError for a malformed line (file and number), which `skip_bad` leaves out.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected <folder>/<task>/{FILE}")
    rows: Rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            rows.append({"answer_prefix": "", **_checked(json.loads(line)), "index": number - 1})
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{path}, line {number}: {error}; --skip_bad leaves it out") from None
            print(f"{path}, line {number}: left out ({error})", file=sys.stderr)
    if not rows:
        raise ValueError(f"{path} has no samples")
    return rows


def _checked(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"got {type(row).__name__}, allowed: an object")
    if not isinstance(row.get("input"), str) or not isinstance(row.get("answer_prefix", ""), str):
        raise ValueError("input and answer_prefix must be texts")
    outputs = row.get("outputs")
    if not isinstance(outputs, list) or not outputs or not all(isinstance(text, str) for text in outputs):
        raise ValueError(f"outputs: got {outputs!r}, allowed: a list of texts, one or more")
    return row
