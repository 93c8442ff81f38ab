"""RULER's two metrics, and the files that its evaluation writes."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from ..results import write_text
from ..runner import read_records
from .specs import TASKS

_CONTROL = re.compile(r"[\x00-\x1f]")


def postprocess(prediction: str) -> str:
    """Stripped, every character 0x00-0x1f a newline, stripped again."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, references: list[str]) -> float:
    """Share of the references, 0 to 1, that occur in the prediction as substrings in any case."""
    return sum(reference.lower() in prediction.lower() for reference in references) / len(references)


def string_match_part(prediction: str, references: list[str]) -> float:
    """1 if any reference occurs in the prediction, else 0."""
    return float(any(reference.lower() in prediction.lower() for reference in references))


_METRICS = {"string_match_all": string_match_all, "string_match_part": string_match_part}


def score_records(task: str, records: list[dict[str, Any]]) -> list[float]:
    """Score of every record {"pred", "expected", ..} of a task, 0 to 100."""
    metric = _METRICS[TASKS[task].metric]
    return [100 * metric(postprocess(record["pred"]), record["expected"]) for record in records]


def write_evaluation(folder: Path, strategy: str) -> dict[str, float] | None:
    """Upstream's files in folder/<strategy>/pred, made from the records of all finished tasks: <task>.jsonl (`input`
    left empty: it is in the data file under the same index), summary.csv (summary-<task>.csv for one task) and
    submission.csv. Returns the scores, None where no task is finished.
    """
    finished = {task: records for task in TASKS if (records := read_records(folder, strategy, task))}
    if not finished:
        return None
    predictions = folder / strategy / "pred"
    predictions.mkdir(exist_ok=True)
    scores, nulls, submission = {}, {}, [["Task", "ID", "Prediction"]]
    for task, records in finished.items():
        answers = [postprocess(record["pred"]) for record in records]
        each = score_records(task, records)
        scores[task] = round(sum(each) / len(each), 2)
        nulls[task] = f"{sum(not answer for answer in answers)}/{len(answers)}"
        submission += [[task, record["index"], answer] for record, answer in zip(records, answers, strict=True)]
        lines = [json.dumps(_upstream_line(record), ensure_ascii=False) + "\n" for record in records]
        write_text(predictions / f"{task}.jsonl", "".join(lines))
    rows = [[*range(len(scores) + 1)], ["Tasks", *scores], ["Score", *scores.values()], ["Nulls", *nulls.values()]]
    name = "summary.csv" if len(scores) > 1 else f"summary-{next(iter(scores))}.csv"
    write_text(predictions / name, _csv(rows))
    write_text(predictions / "submission.csv", _csv(submission))
    return scores


def _upstream_line(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": record["index"],
        "pred": record["pred"],
        "input": "",
        "outputs": record["expected"],
        "others": {},
        "truncation": -1,
        "length": record["length"],
    }


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
