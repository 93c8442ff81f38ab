"""Answers the questions of training sequences from their text alone, to check test_probe_model.py's data."""

import re
from collections import Counter

from tokenizers import Tokenizer

from benchmark.probe_model.sequences import Sequence
from benchmark.probe_model.wording import END

NEEDLE = re.compile(r"One of the special magic \w+ for (.+?) is: (\S+)\.")
NIAH_PREFIX = re.compile(r"The special magic \w+ for ([^\n]+) mentioned in the provided text (?:is|are)$")
VT_PREFIX = re.compile(r"text above, (\d+) variables are assigned the value (\d+), they are: ?$")


def turns(tokenizer: Tokenizer, sequence: Sequence) -> list[tuple[str, str]]:
    """(all text before an answer, the answer with its end token) of every turn."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    return [(text(sequence.ids[: a.start]), text(sequence.ids[a.start : a.end])) for a in sequence.answers]


def expected_answer(before: str) -> str | set[str]:
    """The right answer, or its words where their order is free, behind the text that ends with the answer's prefix."""
    if asked := NIAH_PREFIX.search(before):
        keys = re.split(r", and |, ", asked[1])
        values = [value for wanted in keys for key, value in NEEDLE.findall(before) if key == wanted]
        return values[0] if len(values) == 1 else f"{', '.join(values[:-1])}, and {values[-1]}"
    if asked := VT_PREFIX.search(before):
        return _chain(before, int(asked[1]), asked[2])
    if before.endswith("The top 10 words that appear most often in the list are:"):
        listed = before.rsplit("appear most often.\n", 1)[1].split("\nQuestion:", 1)[0]
        return set(_most_common(re.split(r" ?\d+\. ", listed)[1:], 10))
    assert before.endswith("the three most frequently appeared words are:"), before[-200:]
    coded = before.rsplit("appeared coded words. ", 1)[1].split("\nQuestion:", 1)[0]
    return set(_most_common([word for word in coded.split(" ") if word != "..."], 3))


def given_answer(answer: str, expected: str | set[str]) -> str | set[str]:
    """An answer of a sequence in the form of `expected`."""
    answer = answer.removesuffix(END).strip()
    if isinstance(expected, str):
        return answer.removesuffix(".")
    return set(re.split(r" ?\d+\. ", answer)[1:] if answer.startswith("1. ") else answer.split(" "))


def _most_common(words: list[str], count: int) -> list[str]:
    ranked = Counter(words).most_common(count + 1)
    assert ranked[count - 1][1] > ranked[count][1], f"no clear border in {ranked}"
    return [word for word, _ in ranked[:count]]


def _chain(before: str, count: int, value: str) -> str:
    lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", before.rsplit("hidden in the following text.\n\n", 1)[1])
    chain = [value]
    while followers := [name for name, origin in lines if origin == chain[-1]]:
        chain.append(followers[0])
    assert len(chain) == count + 1
    return " ".join(chain[1:])
