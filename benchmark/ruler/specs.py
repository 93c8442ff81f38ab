"""What the 13 tasks are: templates, constants and metrics out of tasks.json, which names their source and licence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FACTS = json.loads((Path(__file__).parent / "tasks.json").read_text(encoding="utf-8"))
STRINGS: dict[str, Any] = _FACTS["strings"]
CHAT_TEMPLATES: dict[str, str] = _FACTS["chat_templates"]


@dataclass(frozen=True)
class TaskSpec:
    """One task. `template` has the slots {context}, {query}, {type_needle_v}, {num_v}; `answer_prefix`, the beginning
    of the answer, stands behind the assistant header; `args` are the generator's constants."""

    name: str
    generator: str
    args: dict[str, Any]
    template: str
    answer_prefix: str
    new_tokens: int
    metric: str

    @property
    def needs_words(self) -> bool:
        return self.args.get("key") == "words" or self.generator == "common_words_extraction"

    @property
    def needs_essays(self) -> bool:
        return self.args.get("haystack") == "essay"

    @property
    def needs_questions(self) -> bool:
        return self.generator == "qa"


TASKS: dict[str, TaskSpec] = {
    name: TaskSpec(name, task["generator"], task["args"], **_FACTS["generators"][task["generator"]])
    for name, task in _FACTS["tasks"].items()
}
FREE_TASKS = [name for name, spec in TASKS.items() if not (spec.needs_essays or spec.needs_questions)]


def parse_tasks(text: str) -> list[str]:
    """Task names out of "all", "free" (the six that need no data) or a comma list, in RULER's order.

    Raises ValueError for an unknown name, listing the known.
    """
    groups = {"all": list(TASKS), "free": FREE_TASKS}
    asked = [name for word in text.split(",") for name in groups.get(word.strip(), [word.strip()])]
    for name in asked:
        if name not in TASKS:
            raise ValueError(f"task: got {name!r}, allowed: all, free, or some of {', '.join(TASKS)}")
    return [name for name in TASKS if name in asked]
