"""LongBench's scorers equal the official definitions, worked out by hand, quirks and edge cases included."""

import sys
from collections.abc import Iterator

import pytest

from benchmark.LongBench import metrics
from benchmark.LongBench.catalog import DATASETS, METRIC
from benchmark.LongBench.metrics import METRICS, require_packages, scorer_versions


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The Cat!", "cat", 1.0),  # article, case, punctuation
        ("a red cat", "the red dog", 0.5),  # 1 shared of 2 and 2
        ("red red cat", "red dog red", 2 / 3),  # multisets: red counts twice
        ("one two three four", "four", 2 * 0.25 * 1 / 1.25),
        ("co-operate", "cooperate", 1.0),  # punctuation goes without leaving a blank
        ("theatre", "atre", 0.0),  # articles go as whole words only
        ("", "cat", 0.0),
        ("the a an", "the", 0.0),  # nothing is left on either side
        ("猫", "狗", 0.0),
    ],
)
def test_qa_f1(prediction: str, answer: str, expected: float) -> None:
    assert METRICS["qa_f1"](prediction, answer, None) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("北京。", "北京", 1.0),  # Chinese punctuation
        ("ABC", "abc!", 1.0),
        ("北京 上海", "北京", 2 * 0.5 * 1 / 1.5),
        ("", "北京", 0.0),
        ("。」", "。", 0.0),  # only emptied tokens
    ],
)
def test_qa_f1_zh(prediction: str, answer: str, expected: float) -> None:
    pytest.importorskip("jieba")
    assert METRICS["qa_f1_zh"](prediction, answer, None) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the cat sat", "the cat ran", 2 / 3),  # LCS 2 of 3 and 3
        ("sat cat the", "the cat sat", 1 / 3),  # order counts
        ("red", "red red", 1.0),  # the package counts distinct words
        ("a b", "a b c d", 2 * 1 * 0.5 / 1.5),
        ("", "the cat", 0.0),  # the package raises
        ("...", "the cat", 0.0),
        (" ".join(f"w{i}" for i in range(1200)), " ".join(f"w{i}" for i in range(1200)), 0.0),  # its recursion ends
    ],
)
def test_rouge(prediction: str, answer: str, expected: float) -> None:
    pytest.importorskip("rouge")
    assert METRICS["rouge"](prediction, answer, None) == pytest.approx(expected, abs=1e-6)


def test_rouge_is_the_package_with_its_defaults() -> None:
    package = pytest.importorskip("rouge")
    prediction, answer = "One line. Another one, longer. the end", "Another line. the one end. longer"
    whole = package.Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    assert METRICS["rouge"](prediction, answer, None) == whole


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [("北京上海", "北京广州", 0.5), ("北京", "北京", 1.0), ("", "北京", 0.0)],
)
def test_rouge_zh(prediction: str, answer: str, expected: float) -> None:
    pytest.importorskip("jieba")
    pytest.importorskip("rouge")
    assert METRICS["rouge_zh"](prediction, answer, None) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "answer", "classes", "expected"),
    [
        ("Date", "Date", ["Date", "Number"], 1.0),
        ("Date or Number", "Date", ["Date", "Number"], 0.5),
        ("Number", "Date", ["Date", "Number"], 0.0),
        ("", "Date", ["Date", "Number"], 0.0),
        ("date", "Date", ["Date", "Number"], 0.0),  # case counts
        ("Other number", "Other number", ["number", "Other number"], 1.0),  # the part of the gold name goes
        ("Other number", "number", ["number", "Other number"], 0.5),  # the longer name stays
        ("x y z", "x y z", ["x", "y", "x y z"], 0.5),  # removing x skips y: 1/2, not 1
        ("x y z", "x y z", ["x", "q", "y", "x y z"], 0.5),  # names that were not found are not walked over
        ("x y z", "x y z", ["x", "x y z", "y"], 1.0),  # removing x skips the gold name, y is removed
    ],
)
def test_classification(prediction: str, answer: str, classes: list[str], expected: float) -> None:
    assert METRICS["classification"](prediction, answer, classes) == expected


def test_classification_needs_classes() -> None:
    with pytest.raises(ValueError, match="all_classes"):
        METRICS["classification"]("Date", "Date", None)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("7", "7", 1.0),
        ("7 or 8, 7", "7", 2 / 3),
        ("seven", "7", 0.0),
        ("", "7", 0.0),
        ("17", "7", 0.0),
        ("07", "7", 0.0),
    ],
)
def test_count(prediction: str, answer: str, expected: float) -> None:
    assert METRICS["count"](prediction, answer, None) == pytest.approx(expected)


def test_retrieval_takes_the_number_behind_paragraph() -> None:
    assert METRICS["retrieval"]("Paragraph 12, or 3", "Paragraph 12", None) == 0.5
    assert METRICS["retrieval"]("12", "Paragraph 12", None) == 1.0
    assert METRICS["retrieval"]("", "Paragraph 12", None) == 0.0
    assert METRICS["retrieval_zh"]("段落3", "段落3", None) == 1.0
    with pytest.raises(ValueError, match="allowed: one that matches 'Paragraph"):
        METRICS["retrieval"]("12", "12", None)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("abcd", "abce", 0.75),  # 2 * 3 / 8
        ("\n\nabcd\nother", "abcd", 1.0),  # leading newlines, then one line
        ("```python\n# note\nx = 1 // 2\nabcd", "abcd", 1.0),  # lines with `, # or // are passed over
        ("x # y", "x", 0.0),  # no line is left
        ("", "abcd", 0.0),
        ("abcd\n", "abcd", 1.0),
        ("  \nabcd", "abcd", 0.0),  # a line of blanks is a line
    ],
)
def test_code_sim(prediction: str, answer: str, expected: float) -> None:
    pytest.importorskip("fuzzywuzzy")
    assert METRICS["code_sim"](prediction, answer, None) == expected


def test_every_dataset_has_a_scorer() -> None:
    assert len(DATASETS) == 21
    assert set(METRIC.values()) == set(METRICS)


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for package in ("jieba", "rouge", "fuzzywuzzy"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fuzzywuzzy.fuzz", raising=False)
    metrics._package.cache_clear()
    metrics._rouge_l.cache_clear()
    yield
    metrics._package.cache_clear()


@pytest.mark.usefixtures("without_packages")
def test_missing_packages_are_named_with_the_command() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install jieba==0\.42\.1 rouge==1\.0\.1$"):
        require_packages(["qa_f1", "rouge_zh"])
    with pytest.raises(ModuleNotFoundError, match=r"pip install fuzzywuzzy==0\.18\.0$"):
        METRICS["code_sim"]("a", "b", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install rouge==1\.0\.1$"):
        METRICS["rouge"]("a", "b", None)
    require_packages(["qa_f1", "count", "classification"])


def test_versions_name_the_scorers_packages() -> None:
    assert set(scorer_versions()) == {"rouge", "jieba", "fuzzywuzzy", "python-Levenshtein"}
