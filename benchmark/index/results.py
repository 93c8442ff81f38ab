"""The output file: one row for every (configuration, trace), written whole as each is finished."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from config import RetroInferConfig

from ..results import check_writable, write_text


def row_key(strategy: str, settings: RetroInferConfig, trace_digest: str) -> str:
    """What a row is a result of. `core`, the machine's threads beside a GPU, changes seconds and nothing else."""
    made_of = [strategy, settings.model_dump(exclude={"core"}), trace_digest]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


class ResultsFile:
    """{"protocol": {..}, "rows": [..]}, a line a row, each with its key, configuration and environment."""

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        """Reads what an earlier call left. Raises ValueError for a file of another protocol, naming what differs, or
        that is no such file, and OSError where it cannot be written."""
        check_writable(path)
        self.path = path
        self.protocol = json.loads(json.dumps(protocol))
        self.rows: list[dict[str, Any]] = []
        if not path.exists():
            return
        earlier = read_results(path)
        there = earlier["protocol"]
        differing = sorted(key for key in {*there, *protocol} if there.get(key) != self.protocol.get(key))
        if differing:
            told = "; ".join(f"{key}: {there.get(key)!r} there, {self.protocol.get(key)!r} now" for key in differing)
            raise ValueError(f"output: {path} holds results of another protocol ({told}); give another file")
        self.rows = earlier["rows"]

    def __contains__(self, key: str) -> bool:
        return any(row["key"] == key for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in self.rows)
        write_text(self.path, f'{{\n"protocol": {json.dumps(self.protocol)},\n"rows": [\n{lines}\n]\n}}\n')


def read_results(path: Path) -> dict[str, Any]:
    """The content of an output file. Raises FileNotFoundError, ValueError for a file that is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict) or not {"protocol", "rows"} <= content.keys():
        raise ValueError(f"{path}: not a results file of benchmark.index")
    return content
