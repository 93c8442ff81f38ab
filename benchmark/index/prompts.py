"""The prompts that traces are made of: a sample of a RULER task, or the beginning of a text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ruler.chat import chat_template
from ..ruler.generator import Setting
from ..ruler.samples import make_rows
from ..ruler.sources import Sources
from ..ruler.specs import TASKS
from ..ruler.tokens import adds_special_tokens, special_token_count, token_counter


@dataclass(frozen=True)
class Prompt:
    """ids: the tokens; source: where they come from and a digest of them; expected: what an answer should contain."""

    ids: list[int]
    source: dict[str, Any]
    expected: list[str]


def ruler_prompt(
    tokenizer: Any, task: str, context_len: int, seed: int, index: int, template: str, sources: Sources
) -> Prompt:
    """Sample `index` of a RULER task, whose prompt and longest answer have context_len tokens together.

    Raises ValueError for an unknown task, an index the task has no sample for, and as the generators do.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, allowed: {', '.join(TASKS)}")
    if index < 0:
        raise ValueError(f"index: got {index}, allowed: 0 or more")
    chat = chat_template(template, tokenizer)
    special_tokens = special_token_count(tokenizer) if adds_special_tokens(tokenizer, chat.text) else 0
    spec, count = TASKS[task], token_counter(tokenizer)
    setting = Setting(spec, chat, context_len, count, sources, seed, special_tokens=special_tokens)
    made_of = sources.describe(spec)
    rows = make_rows(setting, index + 1)
    if len(rows) <= index:
        raise ValueError(f"index: got {index}, allowed for {task}: 0 to {len(rows) - 1}")
    text = rows[index]["input"] + rows[index]["answer_prefix"]
    ids = tokenizer(text, add_special_tokens=adds_special_tokens(tokenizer, text)).input_ids
    source = {"benchmark": "RULER", "task": task, "context_len": context_len, "seed": seed, "index": index}
    return Prompt(ids, {**source, "template": chat.name, **made_of, "digest": _digest(ids)}, rows[index]["outputs"])


def text_prompt(tokenizer: Any, path: Path, context_len: int) -> Prompt:
    """The first context_len tokens of a text file, no chat template around them.

    Raises OSError, and ValueError for a file that is not UTF-8 or too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path} is not UTF-8: {error}") from None
    ids = tokenizer(text).input_ids
    if len(ids) < context_len:
        raise ValueError(f"context_len: got {context_len}, allowed for {path}: at most its {len(ids)} tokens")
    ids = ids[:context_len]
    return Prompt(ids, {"text": path.name, "context_len": context_len, "digest": _digest(ids)}, [])


def _digest(ids: list[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]
