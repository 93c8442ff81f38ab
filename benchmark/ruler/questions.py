"""Questions and documents of SQuAD v2 and HotpotQA (CC BY-SA 4.0), from files that the user supplies."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LAYOUT = (
    "expected FOLDER/squad.json (SQuAD v2, rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json) and "
    "FOLDER/hotpotqa.json (hotpotqa.github.io, hotpot_dev_distractor_v1.json)"
)


@dataclass(frozen=True)
class Question:
    """gold: documents that are always shown, as indexes; near: documents of the same article."""

    text: str
    answers: list[str]
    gold: list[int]
    near: list[int]


@dataclass(frozen=True)
class Questions:
    """Questions in the file's order and all its documents, each once, sorted. `name`: the file's, and a digest."""

    name: str
    questions: list[Question]
    documents: list[str]


def load_questions(folder: Path | None, dataset: str, skip_bad: bool = False) -> Questions:
    """Reads FOLDER/<dataset>.json; dataset: "squad" or "hotpotqa".

    Raises FileNotFoundError where it is missing (saying where to get it), ValueError for malformed JSON (file and line)
    or a malformed entry (its number), which `skip_bad` leaves out and tells on stderr.
    """
    if folder is None:
        raise FileNotFoundError(f"qa_path: missing, the qa tasks need --qa_path FOLDER; {_LAYOUT}")
    path = Path(folder) / f"{dataset}.json"
    if not path.is_file():
        raise FileNotFoundError(f"qa_path: {path} does not exist; {_LAYOUT}")
    content = path.read_bytes()
    try:
        data = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    entries = _entries(data["data"] if isinstance(data, dict) and "data" in data else data, path, dataset, skip_bad)
    documents = sorted({text for _, texts in entries for text in texts})
    place = {text: index for index, text in enumerate(documents)}
    questions = [
        Question(query, answers, [place[text] for text in gold], [place[text] for text in texts if text not in gold])
        for asked, texts in entries
        for query, answers, gold in asked
    ]
    if not questions:
        raise ValueError(f"{path} has no questions")
    name = f"{path.name} sha256:{hashlib.sha256(content).hexdigest()[:12]}"
    return Questions(name, questions, documents)


_Entry = tuple[list[tuple[str, list[str], list[str]]], list[str]]


def _entries(data: Any, path: Path, dataset: str, skip_bad: bool) -> list[_Entry]:
    """[(questions as (text, answers, gold documents), documents)] of every article or HotpotQA question."""
    parse: Callable[[Any], _Entry] = {"squad": _article, "hotpotqa": _hotpot}[dataset]
    if not isinstance(data, list):
        raise ValueError(f"{path}: got {type(data).__name__}, allowed: the {dataset} file's own layout; {_LAYOUT}")
    entries = []
    for number, item in enumerate(data, 1):
        try:
            entries.append(parse(item))
        except (KeyError, TypeError, ValueError) as error:
            if not skip_bad:
                raise ValueError(f"{path}, entry {number}: malformed ({error!r}); --skip_bad leaves it out") from None
            print(f"{path}, entry {number}: left out ({error!r})", file=sys.stderr)
    return entries


def _article(article: dict[str, Any]) -> _Entry:
    paragraphs = article["paragraphs"]
    asked = [
        (question["question"], [answer["text"] for answer in question["answers"]], [paragraph["context"]])
        for paragraph in paragraphs
        for question in paragraph["qas"]
        if not question["is_impossible"]
    ]
    return asked, [paragraph["context"] for paragraph in paragraphs]


def _hotpot(question: dict[str, Any]) -> _Entry:
    documents = [f"{title}\n{''.join(sentences)}" for title, sentences in question["context"]]
    return [(question["question"], [question["answer"]], documents)], documents
