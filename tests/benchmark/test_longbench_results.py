"""LongBench's results: scores of datasets, averages with what is missing, agreement with full attention, layouts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from longbench_samples import CLASSES, make_record, prediction

from benchmark.LongBench.catalog import CATEGORIES, DATASETS, E_DATASETS, ENGLISH_AND_CODE
from benchmark.LongBench.compare import compare, main, same_prefix, similarity, table
from benchmark.LongBench.layouts import write_kvcache_factory, write_upstream
from benchmark.LongBench.prompting import format_prompt
from benchmark.LongBench.scoring import (
    averages,
    bucket_averages,
    bucket_of,
    sample_scores,
    score_buckets,
    score_dataset,
)


def records(dataset: str, *preds: str, **changes: Any) -> list[dict[str, Any]]:
    return [prediction(make_record(dataset, number, **changes), pred) for number, pred in enumerate(preds)]


def test_a_sample_scores_its_best_answer_and_a_dataset_its_mean() -> None:
    lines = records("hotpotqa", "red cat", "dog", "red", answers=["red cat", "dog"])
    assert sample_scores("hotpotqa", lines) == pytest.approx([100, 100, 200 / 3])
    assert score_dataset("hotpotqa", lines) == 88.89
    assert score_dataset("hotpotqa", records("hotpotqa", "", "")) == 0
    with pytest.raises(ValueError, match="hotpotqa: got no records"):
        score_dataset("hotpotqa", [])


def test_only_few_shot_datasets_are_cut_to_the_first_line() -> None:
    pred = "\n\nred cat\nand much more that was not asked for"
    assert score_dataset("triviaqa", records("triviaqa", pred)) == 100
    assert score_dataset("hotpotqa", records("hotpotqa", pred)) < 50
    assert score_dataset("trec", records("trec", "\nDate\nNumber")) == 100
    assert score_dataset("trec", records("trec", "Number\nDate")) == 0


def test_every_record_is_scored_with_the_last_ones_classes() -> None:
    lines = records("trec", "Date or Number", "Date")
    assert score_dataset("trec", lines) == 75
    lines[1]["all_classes"] = ["Date"]  # upstream reads the file to its end before it scores
    assert score_dataset("trec", lines) == 100
    assert lines[0]["all_classes"] == CLASSES


def test_buckets_of_the_e_variant() -> None:
    assert [bucket_of(length) for length in (0, 3999, 4000, 7999, 8000, 99999)] == [
        "0-4k",
        "0-4k",
        "4-8k",
        "4-8k",
        "8k+",
        "8k+",
    ]
    lines = records("hotpotqa", "red cat", "dog", "red cat")
    for line, length in zip(lines, (10, 3999, 8000), strict=True):
        line["length"] = length
    scores = score_buckets("hotpotqa", lines)
    assert (scores["0-4k"], scores["8k+"]) == (50, 100)
    assert math.isnan(scores["4-8k"])


def test_both_averages() -> None:
    scores = {name: float(place) for place, name in enumerate(DATASETS)}
    by_category, plain = averages(scores)
    means = [sum(scores[name] for name in names) / len(names) for names in CATEGORIES.values()]
    assert by_category.label == "mean of the six category means (21 datasets)"
    assert by_category.score == round(sum(means) / 6, 2)
    assert plain.label == "mean of the 16 English and code datasets"
    assert plain.score == round(sum(scores[name] for name in ENGLISH_AND_CODE) / 16, 2)
    assert by_category.missing == plain.missing == []


def test_averages_say_what_is_missing() -> None:
    by_category, plain = averages({"narrativeqa": 10.0, "qasper": 20.0, "lcc": 50.0, "lsht": 30.0})
    assert by_category.of == {"Single-Document QA": 15, "Few-shot learning": 30, "Code Completion": 50}
    assert by_category.score == 31.67
    assert len(by_category.missing) == 17
    assert plain.score == 26.67
    assert "multifieldqa_en" in plain.missing
    assert "lsht" not in plain.missing
    assert [mean.score for mean in averages({})] == [None, None]


def test_averages_of_buckets_leave_empty_ones_out() -> None:
    nan = float("nan")
    scores = {"lcc": {"0-4k": 10.0, "4-8k": 20.0, "8k+": nan}, "trec": {"0-4k": 30.0, "4-8k": nan, "8k+": nan}}
    means = bucket_averages(scores)
    assert [mean.score for mean in means] == [20, 20, None]
    assert [len(mean.missing) for mean in means] == [11, 12, len(E_DATASETS)]


def test_upstreams_layout(tmp_path: Path) -> None:
    lines = {"hotpotqa": records("hotpotqa", "red cat", "猫\u2028"), "trec": records("trec", "Date")}
    assert write_upstream(tmp_path / "pred" / "m", lines) == {"hotpotqa": 50.0, "trec": 100.0}
    assert json.loads((tmp_path / "pred" / "m" / "result.json").read_text()) == {"hotpotqa": 50.0, "trec": 100.0}
    written = (tmp_path / "pred" / "m" / "hotpotqa.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(written[1]) == {"pred": "猫\u2028", "answers": ["red cat"], "all_classes": None, "length": 41}
    assert written[2:] == [""]


def test_upstreams_layout_of_the_e_variant(tmp_path: Path) -> None:
    write_upstream(tmp_path, {"hotpotqa": records("hotpotqa", "red cat")}, extended=True)
    scores = json.loads((tmp_path / "result.json").read_text())["hotpotqa"]
    assert scores["0-4k"] == 100
    assert math.isnan(scores["8k+"])


def test_kvcache_factorys_layout(tmp_path: Path) -> None:
    sources = [make_record("trec", number) for number in range(2)]
    lines = [prediction(sources[1], "Date"), prediction(sources[0], "Number")]
    write_kvcache_factory(tmp_path / "m_512", "FullKV", {"trec": lines}, {"trec": sources})
    written = [json.loads(line) for line in (tmp_path / "m_512" / "trec" / "FullKV.json").read_text().split("\n")[:-1]]
    assert [line["_id"] for line in written] == ["trec-1", "trec-0"]
    fields = ["prompt", "input", "context", "answers", "pred", "length", "dataset", "language", "all_classes", "_id"]
    assert list(written[0]) == fields
    assert written[0]["prompt"] == format_prompt("trec", sources[1])
    assert written[0]["pred"] == "Date"


@pytest.mark.parametrize(
    ("text", "other", "share"),
    [("", "", 1.0), ("abc", "abc", 1.0), ("abc", "abd", 2 / 3), ("ab", "abcd", 0.5), ("", "a", 0.0), ("xa", "a", 0.0)],
)
def test_same_prefix(text: str, other: str, share: float) -> None:
    assert same_prefix(text, other) == same_prefix(other, text) == pytest.approx(share)


def test_similarity() -> None:
    pytest.importorskip("rouge")
    assert similarity("", "", "en") == 1
    assert similarity("one two", "", "en") == 0
    assert similarity("the cat sat", "the cat ran", "en") == pytest.approx(2 / 3, abs=1e-6)
    pytest.importorskip("jieba")
    assert similarity("北京上海", "北京广州", "zh") == pytest.approx(0.5, abs=1e-6)


def agreeing() -> dict[str, dict[str, list[dict[str, Any]]]]:
    return {
        "full": {"hotpotqa": records("hotpotqa", "red cat", "dog"), "trec": records("trec", "Date")},
        "flat": {"hotpotqa": records("hotpotqa", "red cat", "red cat"), "trec": records("trec", "Number")},
        "other": {"trec": records("trec", "Date")},
    }


def test_agreement_with_full_attention() -> None:
    pytest.importorskip("rouge")
    rows = compare(agreeing())
    assert [(row.strategy, row.dataset) for row in rows] == [
        ("flat", "hotpotqa"),
        ("flat", "trec"),
        ("flat", "mean of 2"),
        ("other", "trec"),
        ("other", "mean of 1"),
    ]
    hotpotqa, trec, mean = rows[:3]
    assert (hotpotqa.samples, hotpotqa.full, hotpotqa.score, hotpotqa.difference) == (2, 50, 100, 50)
    assert (hotpotqa.rouge_l, hotpotqa.same_prefix, hotpotqa.identical) == (0.5, 0.5, 0.5)
    assert (trec.difference, trec.identical) == (-100, 0)
    assert (mean.samples, mean.difference, mean.identical) == (3, -25, 0.25)
    assert [(row.answered, row.same_answer) for row in rows] == [(2, 1), (1, 0), (3, 1), (1, 1), (1, 1)]
    assert rows[4].rouge_l == 1
    assert "| flat | hotpotqa | 2 | 50.00 | 100.00 | +50.00 | 0.500 | 0.500 | 50% | 1 of 2 |" in table(rows)


def test_blank_answers_are_not_counted_as_the_same_answer() -> None:
    pytest.importorskip("rouge")
    found = {"full": {"hotpotqa": records("hotpotqa", "", "dog")}, "flat": {"hotpotqa": records("hotpotqa", "", "cat")}}
    row = compare(found)[0]
    assert (row.identical, row.answered, row.same_answer) == (0.5, 1, 0)


def test_agreement_needs_the_same_samples_and_full_attention() -> None:
    pytest.importorskip("rouge")
    found = agreeing()
    found["flat"]["trec"][0]["id"] = "another"
    with pytest.raises(ValueError, match="trec: flat and full hold different samples"):
        compare(found)
    with pytest.raises(ValueError, match="strategies: got flat, allowed: full among them"):
        compare({"flat": found["flat"]})


def test_compare_reads_a_runners_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rouge")
    pytest.importorskip("jieba")
    for strategy, by_dataset in agreeing().items():
        for dataset, lines in by_dataset.items():
            (tmp_path / strategy).mkdir(exist_ok=True)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / strategy / f"{dataset}.jsonl").write_text(text)
    (tmp_path / "parts").mkdir()
    results = {"config": {"model": "m"}, "environment": {"commit": "c"}, "results": {}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert main([str(tmp_path), "--output", str(tmp_path / "rows.json")]) == 0
    assert "| flat | mean of 2 | 3 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert (written["config"], written["environment"], len(written["rows"])) == ({"model": "m"}, {"commit": "c"}, 5)
    assert main([str(tmp_path / "nowhere")]) == 2
