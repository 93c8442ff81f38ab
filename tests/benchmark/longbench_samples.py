"""Records, tokenizers and folders that the LongBench tests share; nothing of it is LongBench's own text."""

import json
from pathlib import Path
from typing import Any

from benchmark.LongBench.catalog import METRIC

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "longbench" / "samples"
CLASSES = ["Number", "Date", "Other number"]
_ANSWERS = {"retrieval": "Paragraph 3", "retrieval_zh": "段落3", "count": "3", "classification": "Date"}


def make_record(dataset: str, number: int = 0, /, **changes: Any) -> dict[str, Any]:
    """A record in LongBench's schema."""
    metric = METRIC[dataset]
    record = {
        "input": f"question {number}",
        "context": "some words of context " * 10,
        "answers": [_ANSWERS.get(metric, "red cat")],
        "length": 40 + number,
        "dataset": dataset,
        "language": "zh" if metric.endswith("_zh") else "en",
        "all_classes": CLASSES if metric == "classification" else None,
        "_id": f"{dataset}-{number}",
    }
    return {**record, **changes}


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def prediction(record: dict[str, Any], pred: str) -> dict[str, Any]:
    """What the runner keeps of a record."""
    kept = {key: record[key] for key in ("dataset", "language", "length", "all_classes")}
    return {"id": record["_id"], "pred": pred, "expected": record["answers"], **kept, "truncated": False}


class WordTokenizer:
    """One token a word or newline, ids in order of appearance, a begin token 0 and an end token 1; a chat template in
    angle brackets unless `chat_template` is None."""

    def __init__(self, chat_template: str | None = "angle brackets", special: tuple[str, ...] = ()) -> None:
        self.chat_template = chat_template
        self.words = ["<s>", "</s>", *special]

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = self.encode(text, add_special_tokens=False)
        return type("Encoding", (), {"input_ids": [0, *ids] if add_special_tokens else ids})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        ids = []
        for word in text.replace("\n", " \n ").split(" "):
            if word and word not in self.words:
                self.words.append(word)
            if word:
                ids.append(self.words.index(word))
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(self.words[id_] for id_ in ids if not (skip_special_tokens and id_ < 2))

    def get_vocab(self) -> dict[str, int]:
        return {word: id_ for id_, word in enumerate(self.words)}

    def apply_chat_template(self, chat: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        assert [turn["role"] for turn in chat] == ["user"]
        return f"<user> {chat[0]['content']} <assistant>"
