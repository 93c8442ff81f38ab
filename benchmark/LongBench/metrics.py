"""LongBench's scorers (metrics.py of THUDM/LongBench, commit 2e00731), quirks included: each gives 0 to 1 for one
prediction and one reference. rouge, jieba and fuzzywuzzy are imported where a scorer needs them."""

from __future__ import annotations

import importlib
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any

from .catalog import CHINESE_PUNCTUATION
from .records import REFERENCE_NUMBER

Metric = Callable[[str, str, Sequence[str] | None], float]

REQUIREMENTS = {"rouge": "rouge==1.0.1", "jieba": "jieba==0.42.1", "fuzzywuzzy": "fuzzywuzzy==0.18.0"}
NEEDED = {
    "qa_f1_zh": ("jieba",),
    "rouge": ("rouge",),
    "rouge_zh": ("jieba", "rouge"),
    "code_sim": ("fuzzywuzzy",),
}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)


def require_packages(metrics: Iterable[str]) -> None:
    """ModuleNotFoundError, with the pip command, where a package that one of these metrics needs is missing."""
    packages = sorted({package for metric in metrics for package in NEEDED.get(metric, ())})
    missing = []
    for package in packages:
        try:
            _package(package)
        except ModuleNotFoundError:
            missing.append(package)
    if missing:
        raise ModuleNotFoundError(_install(missing))


def scorer_versions() -> dict[str, str | None]:
    """Versions of what the scores depend on; fuzzywuzzy's ratio differs slightly with python-Levenshtein installed."""
    versions: dict[str, str | None] = {}
    for package in (*REQUIREMENTS, "python-Levenshtein"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def qa_f1(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    """F1 of the words, as multisets, without case, ASCII punctuation and the articles a, an, the."""
    return _f1(_english_words(prediction), _english_words(answer))


def qa_f1_zh(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    """F1 of jieba's tokens without case, ASCII and Chinese punctuation and whitespace; emptied tokens do not count."""
    return _f1(_chinese_words(prediction), _chinese_words(answer))


def rouge(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    """Rouge-L f of the package rouge; 0 where it raises: an empty text, a sentence too long for its recursion."""
    return _rouge_l(prediction, answer)


def rouge_zh(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    """Rouge-L f of both texts cut by jieba and joined by blanks."""
    return rouge(" ".join(cut(prediction)), " ".join(cut(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    """1 / number of class names found in the prediction if the answer is among them, else 0.

    Names that are part of the answer's are dropped during the walk over the names found, so the name behind a dropped
    one is not looked at: upstream's behaviour. Raises ValueError without classes.
    """
    if not classes:
        raise ValueError("classification: got no all_classes, allowed: a list of class names")
    found = [name for name in classes if name in prediction]
    for name in found:
        if name in answer and name != answer:
            found.remove(name)
    return 1 / len(found) if answer in found else 0.0


def count(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    """Share of the prediction's numbers that are the answer's; 0 where it has none."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    """`count` against the number behind "Paragraph " in the answer. Raises ValueError where there is none."""
    return count(prediction, _reference_number("retrieval", answer))


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    """`count` against the number behind "段落" in the answer. Raises ValueError where there is none."""
    return count(prediction, _reference_number("retrieval_zh", answer))


def code_sim(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    """fuzzywuzzy's ratio of the answer and the prediction's first line without `, # and //, after leading newlines."""
    lines = prediction.lstrip("\n").split("\n")
    first = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return float(_package("fuzzywuzzy.fuzz").ratio(first, answer) / 100)


METRICS: Mapping[str, Metric] = {
    metric.__name__: metric
    for metric in (qa_f1, qa_f1_zh, rouge, rouge_zh, classification, count, retrieval, retrieval_zh, code_sim)
}


def cut(text: str) -> list[str]:
    """jieba's tokens of a text, blanks and punctuation included."""
    return list(_package("jieba").cut(text, cut_all=False))


@cache  # a text is scored for several files and tables, half a second for a long summary
def _rouge_l(prediction: str, answer: str) -> float:
    try:
        scores = _package("rouge").Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer], avg=True)
    except (ValueError, RecursionError):
        return 0.0
    return float(scores["rouge-l"]["f"])


@cache
def _package(name: str) -> Any:
    root = name.partition(".")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fuzzywuzzy recommends python-Levenshtein, which would change scores
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != root:
            raise
        raise ModuleNotFoundError(_install([root]), name=root) from None
    if name == "jieba":
        module.setLogLevel("WARNING")
    return module


def _install(packages: Sequence[str]) -> str:
    wanted = " ".join(REQUIREMENTS[package] for package in packages)
    return f"LongBench's scorers need {' and '.join(packages)}: pip install {wanted}"


def _reference_number(metric: str, answer: str) -> str:
    found = REFERENCE_NUMBER[metric].search(answer)
    if found is None:
        raise ValueError(
            f"{metric}: got the answer {answer!r}, allowed: one that matches {REFERENCE_NUMBER[metric].pattern!r}"
        )
    return found[1]


def _english_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_ASCII_PUNCTUATION)).split()


def _chinese_words(text: str) -> list[str]:
    words = ("".join(token.lower().translate(_WITHOUT_PUNCTUATION).split()) for token in cut(text))
    return [word for word in words if word]


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    shared = (Counter(prediction) & Counter(answer)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 * precision * recall / (precision + recall)
