"""Tokenizers, sources and settings that the RULER tests share."""

import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from benchmark.ruler.chat import ChatTemplate
from benchmark.ruler.generator import Setting
from benchmark.ruler.sources import Sources
from benchmark.ruler.specs import TASKS

ROOT = Path(__file__).parents[2]
ALICE = ROOT / "benchmark" / "text" / "alice_in_wonderland.txt"
SHARED = ROOT.parent / "shared" / "data" / "ruler"
CHAT = ChatTemplate("test", "<|im_start|>You are kind. Some say so.<|user|>", "<|end|><|assistant|>\n")
_PIECE = re.compile(r"\w{1,4}|[^\w\s]")


class Pieces:
    """Tokenizer of pieces of up to four letters or digits; it has a ChatML template and adds no special tokens."""

    bos_token = "<|im_start|>"
    chat_template = "<|im_start|>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return type("Encoding", (), {"input_ids": _PIECE.findall(text)})

    def __len__(self) -> int:
        return 49152

    def apply_chat_template(self, chat: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        return f"<|im_start|>user\n{chat[0]['content']}<|im_end|>\n<|im_start|>assistant\n"


def pieces(text: str) -> int:
    return len(_PIECE.findall(text))


def words(text: str) -> int:
    return len(text.split())


def setting(task: str, length: int, **changes: Any) -> Setting:
    """A task at a length, with test questions and the repository's own text in place of the essays."""
    if TASKS[task].needs_words:
        pytest.importorskip("wonderwords", reason="the word lists are in the benchmark extra")
    if TASKS[task].needs_essays:
        pytest.importorskip("nupunkt", reason="the sentence splitter is in the benchmark extra")
    defaults: dict[str, Any] = {"chat": CHAT, "count": pieces, "sources": sources()}
    return Setting(TASKS[task], length=length, **{**defaults, **changes})


@cache
def sources() -> Sources:
    with TemporaryDirectory() as folder:
        made = Sources(essay_path=ALICE, qa_path=write_questions(Path(folder)))
        for dataset in ("squad", "hotpotqa"):
            made.questions(dataset)  # read now and kept
    return made


def write_questions(folder: Path, articles: int = 20, questions: int = 30) -> Path:
    """squad.json and hotpotqa.json in their own layouts, documents of about 60 words."""

    def text(*names: Any) -> str:
        return " ".join(f"{'-'.join(map(str, names))} fact {i} is true." for i in range(15))

    data = []
    for a in range(articles):
        paragraphs = []
        for p in range(4):
            asked = {"question": f"What is {a} {p}?", "is_impossible": False, "answers": [{"text": f"{a}-{p} fact 3"}]}
            never = {"question": "Who?", "is_impossible": True, "answers": []}
            paragraphs.append({"context": text(a, p), "qas": [never, asked]})
        data.append({"title": f"article {a}", "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": data}))
    hotpot = [
        {
            "question": f"Which {q}?",
            "answer": f"{q}-0 fact 5",
            "context": [[f"title {q} {d}", [text(q, d), " And more."]] for d in range(10)],
        }
        for q in range(questions)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot))
    return folder
