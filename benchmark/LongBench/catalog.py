"""What LongBench v1 consists of: datasets, categories, metrics and their constants (data/README.md says from where)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_DATA = Path(__file__).parent / "data"


def _read(name: str) -> Any:
    return json.loads((_DATA / name).read_text(encoding="utf-8"))


_TASKS = _read("tasks.json")

PROMPTS: Mapping[str, str] = _read("prompts.json")
MAX_NEW_TOKENS: Mapping[str, int] = _read("maxlen.json")
METRIC: Mapping[str, str] = _TASKS["metric"]
DATASETS: tuple[str, ...] = tuple(METRIC)
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    name: tuple(category["datasets"]) for name, category in _TASKS["categories"].items()
}
CATEGORY_OF_SHORT: Mapping[str, str] = {category["short"]: name for name, category in _TASKS["categories"].items()}
NO_CHAT_TEMPLATE = frozenset(_TASKS["no_chat_template"])
FIRST_LINE_ONLY = frozenset(_TASKS["first_line_only"])
E_DATASETS: tuple[str, ...] = tuple(_TASKS["longbench_e"])
E_BUCKETS: Mapping[str, tuple[int, int | None]] = {
    name: (low, high) for name, (low, high) in _TASKS["longbench_e_buckets"].items()
}
ENGLISH_AND_CODE: tuple[str, ...] = tuple(_TASKS["english_and_code_16"])
CHINESE_PUNCTUATION: str = _TASKS["chinese_punctuation"]


def choose_datasets(names: Iterable[str] = (), categories: Iterable[str] = (), extended: bool = False) -> list[str]:
    """The named datasets and those of the named categories ("SQA" .. "CC") in LongBench's order; all if none is named.

    extended: of LongBench-E, which has 13 of them. Raises ValueError for an unknown name, listing the known ones.
    """
    known = E_DATASETS if extended else DATASETS
    variant = "LongBench-E" if extended else "LongBench"
    chosen = set(names)
    if unknown := sorted(chosen.difference(known)):
        raise ValueError(f"datasets: got {', '.join(unknown)}; {variant} has {', '.join(known)}")
    for short in categories:
        if short not in CATEGORY_OF_SHORT:
            raise ValueError(f"category: got {short!r}, allowed: {', '.join(CATEGORY_OF_SHORT)}")
        chosen.update(set(CATEGORIES[CATEGORY_OF_SHORT[short]]).intersection(known))
    return [name for name in DATASETS if name in chosen] if chosen else [name for name in DATASETS if name in known]
