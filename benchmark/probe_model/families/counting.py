"""Counting words: the most common ones of a numbered list (cwe), and of coded text (fwe)."""

from __future__ import annotations

import math
import random
import string
from functools import lru_cache

import numpy as np

from benchmark.ruler.specs import STRINGS

from ..materials import Materials
from ..sequences import Sequence, Turn, count_tokens, encode_prompt, encode_turns, join
from ..wording import ChatStyle, word_task

_COMMON = 10
_LIST_ITEM_TOKENS = 6.6
_LIST_FRAME_TOKENS = 700
_FEWEST_LISTED = 20
_CODED_WORD_TOKENS = 3.3
_CODED_FRAME_TOKENS = 150
_ATTEMPTS = 8


def common_words(materials: Materials, rng: random.Random, length: int, style: ChatStyle) -> Sequence | None:
    """A numbered list in which ten words come more often than the others, after a worked example."""
    common, rest = _repeats(rng, length)
    # RULER repeats the whole chat template around the worked example
    own_message = rng.random() < 0.5
    count = int(((length - _LIST_FRAME_TOKENS) / _LIST_ITEM_TOKENS - _COMMON * common) / rest) + _COMMON
    wording = word_task("cwe")
    for _ in range(_ATTEMPTS):
        shown, found = _word_list(materials, rng, *((20, 3, 1) if length < 4096 else (40, 10, 3)))
        worked, solution = wording.message(shown), f"{wording.answer_prefix} {_numbered(found)}\n"
        context, answer = _word_list(materials, rng, max(_FEWEST_LISTED, count), common, rest)
        message = wording.message(context)
        before = style.first(worked) + solution if own_message else ""
        inside = message if own_message else worked + solution + message
        prompt = materials.encode(before + style.first(inside) + wording.answer_prefix)
        tail = encode_turns(materials, style, [Turn(wording, f" {_numbered(answer)}", "cwe")])
        excess = len(prompt) + count_tokens(tail) - length
        if excess <= 0:
            return join(prompt, tail)
        count -= int(excess / _LIST_ITEM_TOKENS / rest) + 4
    return None


def _repeats(rng: random.Random, length: int) -> tuple[int, int]:
    """How often the common and the other words come: mostly as in RULER."""
    common = (30 if length >= 4096 else 6) if rng.random() < 0.6 else rng.randint(8, 45)
    rest = (3 if length >= 4096 else 1) if rng.random() < 0.7 else rng.randint(1, max(1, common // 6))
    while _COMMON * common * 7 > length * 0.75:
        common = int(common * 0.7)
    return common, min(rest, max(1, common // 4))


def _word_list(materials: Materials, rng: random.Random, count: int, common: int, rest: int) -> tuple[str, list[str]]:
    """A numbered list of `count` different words (as many as there are), and its common ones."""
    words = rng.sample(materials.common_words, min(count, len(materials.common_words)))
    listed = words[:_COMMON] * common + words[_COMMON:] * rest
    rng.shuffle(listed)
    return _numbered(listed), words[:_COMMON]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def frequent_words(materials: Materials, rng: random.Random, length: int, style: ChatStyle) -> Sequence | None:
    """Made-up words whose frequencies follow a zeta distribution; the three most frequent are asked for."""
    alpha = 2.0 if rng.random() < 0.75 else rng.choice([1.8, 2.2, 2.5])
    wording = word_task("fwe")
    count = int((length - _CODED_FRAME_TOKENS) / _CODED_WORD_TOKENS)
    for attempt in range(1, _ATTEMPTS + 1):
        context, answer = _coded_text(rng, count, max(8, (length - 50) // 50), alpha)
        prompt = encode_prompt(materials, style, wording, context)
        tail = encode_turns(materials, style, [Turn(wording, f" {' '.join(answer)}", "fwe")])
        total = len(prompt) + count_tokens(tail)
        if total <= length and (total >= 0.9 * length or attempt == _ATTEMPTS):
            return join(prompt, tail)
        count = int(count * length * 0.97 / total) - (8 if total > length else 0)
    return None


def _coded_text(rng: random.Random, count: int, vocabulary_size: int, alpha: float) -> tuple[str, list[str]]:
    """About `count` words in random order, that of rank r about count r^-alpha / zeta(alpha) times; ranks 2 to 4."""
    distinct: dict[str, None] = {}
    while len(distinct) < vocabulary_size:
        distinct["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    vocabulary = list(distinct)
    vocabulary[0] = STRINGS["fwe_top_word"]
    counts = (count * np.arange(1, vocabulary_size + 1) ** -alpha / _zeta(alpha)).astype(int)
    text = [word for word, repeats in zip(vocabulary, counts, strict=True) for _ in range(repeats)]
    rng.shuffle(text)
    return " ".join(text), vocabulary[1:4]


@lru_cache
def _zeta(alpha: float) -> float:
    return math.pi**2 / 6 if alpha == 2 else sum(rank**-alpha for rank in range(1, 200_000))
