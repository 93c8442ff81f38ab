"""RULER's metrics on hand-computed cases, and upstream's result files made from records."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmark.ruler.scoring import postprocess, score_records, string_match_all, string_match_part, write_evaluation


@pytest.mark.parametrize(
    ("prediction", "references", "share", "any_one"),
    [
        ("1234567.", ["1234567"], 1, 1),
        ("the number is 1234567 or 7654321", ["1234567", "7654321", "1111111", "2222222"], 0.5, 1),
        ("", ["1234567"], 0, 0),
        ("", ["", "a"], 0.5, 1),
        ("12345678", ["1234567"], 1, 1),
        ("123456", ["1234567"], 0, 0),
        ("ABCDE fghij", ["abcde", "FGHIJ"], 1, 1),
        ("the Eiffel Tower", ["eiffel tower", "the Eiffel Tower in Paris"], 0.5, 1),
        ("a a", ["a", "a"], 1, 1),
        ("yes\nno", ["yes no"], 0, 0),
        ("STRASSE", ["straße"], 0, 0),
        ("İstanbul", ["i̇stanbul"], 1, 1),
    ],
)
def test_metrics(prediction: str, references: list[str], share: float, any_one: float) -> None:
    assert string_match_all(prediction, references) == share
    assert string_match_part(prediction, references) == any_one


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a  ", "a"),
        ("a\tb\x00c\x1fd", "a\nb\nc\nd"),
        ("\x00 \x01", ""),
        ("\x00a\x00", "a"),
        ("a\r\nb", "a\n\nb"),
        ("a\x20b\x7f", "a b\x7f"),
        ("\u3000a\u3000", "a"),
        ("", ""),
    ],
)
def test_postprocessing(raw: str, clean: str) -> None:
    assert postprocess(raw) == clean


def record(index: int, pred: str, expected: list[str]) -> dict[str, Any]:
    return {"id": f"{index}-x", "index": index, "pred": pred, "expected": expected, "length": 4000 + index}


def test_scores_follow_the_tasks_metric_and_see_the_postprocessed_prediction() -> None:
    records = [record(0, "red\tcar", ["red car", "red\ncar"]), record(1, "none", ["a", "b"])]
    assert score_records("vt", records) == [50.0, 0.0]
    assert score_records("qa_1", records) == [100.0, 0.0]


def write(folder: Path, task: str, records: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))


def test_result_files_are_upstreams(tmp_path: Path) -> None:
    write(tmp_path / "full", "qa_1", [record(0, "Paris, of course", ["paris"]), record(1, " \n", ["Rome"])])
    write(tmp_path / "full", "vt", [record(i, 'A,B "C"' if i else "A B C\n", ["A", "B", "D"]) for i in range(3)])
    assert write_evaluation(tmp_path, "full") == {"vt": 66.67, "qa_1": 50.0}
    folder = tmp_path / "full" / "pred"
    assert (folder / "summary.csv").read_text() == "0,1,2\nTasks,vt,qa_1\nScore,66.67,50.0\nNulls,0/3,1/2\n"
    assert (folder / "submission.csv").read_text() == (
        'Task,ID,Prediction\nvt,0,A B C\nvt,1,"A,B ""C"""\nvt,2,"A,B ""C"""\nqa_1,0,"Paris, of course"\nqa_1,1,\n'
    )
    lines = [json.loads(line) for line in (folder / "qa_1.jsonl").read_text().splitlines()]
    assert list(lines[0]) == ["index", "pred", "input", "outputs", "others", "truncation", "length"]
    assert (lines[1]["index"], lines[1]["pred"], lines[1]["outputs"], lines[1]["length"]) == (1, " \n", ["Rome"], 4001)


def test_one_task_has_its_own_summary(tmp_path: Path) -> None:
    write(tmp_path / "flat", "cwe", [record(0, "", ["a"])])
    assert write_evaluation(tmp_path, "flat") == {"cwe": 0.0}
    assert (tmp_path / "flat" / "pred" / "summary-cwe.csv").read_text() == "0,1\nTasks,cwe\nScore,0.0\nNulls,1/1\n"
    assert not (tmp_path / "flat" / "pred" / "summary.csv").exists()


def test_nothing_finished_is_nothing_scored(tmp_path: Path) -> None:
    assert write_evaluation(tmp_path, "full") is None
    assert not (tmp_path / "full").exists()
