"""Needles hidden in prose or noise: what niah_single_1 to _3, multikey_1, multivalue and multiquery ask for."""

from __future__ import annotations

import math
import random

from ..materials import Materials
from ..sequences import Sequence, Turn, count_tokens, encode_prompt, encode_turns, join
from ..wording import NOISE, ChatStyle, word_list, word_needle, word_niah

_NOISE_TOKENS = 25
_FRAME_TOKENS = 140
_NEEDLE_TOKENS = {"numbers": 24, "uuids": 56}
_LIKE_RULER = ((1, 1), (4, 1), (1, 4), (4, 1))
_ATTEMPTS = 4


def hidden_needles(
    materials: Materials, rng: random.Random, length: int, style: ChatStyle, haystack: str
) -> Sequence | None:
    """haystack "text": up to 72 keys with 1 to 4 values, numbers or uuids, between the sentences of the corpus;
    "noise": numbers, between repetitions of RULER's noise line. A quarter has the numbers of keys and values that a
    RULER task has."""
    value_kind = rng.choices(["numbers", "uuids"], [0.72, 0.28])[0] if haystack == "text" else "numbers"
    like_ruler = rng.random() < 0.25
    if like_ruler:
        key_count, value_count = rng.choice(_LIKE_RULER) if haystack == "text" else (1, 1)
        values = {
            materials.new_key(rng, "words"): [materials.new_value(rng, value_kind) for _ in range(value_count)]
            for _ in range(key_count)
        }
    else:
        values = _mixed_values(materials, rng, length, value_kind)
    needles = [(key, value) for key, own in values.items() for value in own]
    rng.shuffle(needles)
    in_order = {key: [value for owner, value in needles if owner == key] for key in values}
    task = f"text_{value_kind}" if haystack == "text" else "noise"
    turns = _ask(rng, in_order, value_kind, task, 4 if like_ruler else max(3, min(30, length // 220)))

    sentences = [word_needle(value_kind, key, value) for key, value in needles]
    tail = encode_turns(materials, style, turns)
    room = length - count_tokens(tail)
    budget = room - len(materials.encode("\n".join(sentences))) - _FRAME_TOKENS
    for _ in range(_ATTEMPTS):
        if haystack == "text":
            units, between = materials.corpus.passage(rng, budget), " "
        else:
            units, between = [NOISE] * max(1, budget // _NOISE_TOKENS), "\n"
        context = between.join(_weave(rng, units, sentences))
        prompt = encode_prompt(materials, style, turns[0].wording, context)
        if len(prompt) <= room:
            return join(prompt, tail)
        budget -= len(prompt) - room + 40
    return None


def _mixed_values(materials: Materials, rng: random.Random, length: int, value_kind: str) -> dict[str, list[str]]:
    """Values by key: many keys, some of them alike, most with one value."""
    most = max(6, min(72, int(length * 0.3 / _NEEDLE_TOKENS[value_kind])))
    values: dict[str, list[str]] = {}
    for _ in range(int(math.exp(rng.uniform(math.log(4), math.log(most))))):
        key = materials.new_key(rng, "words")
        if rng.random() < 0.1 and values:
            key = materials.near_key(rng, list(values)[-1])
        if key not in values:
            count = rng.choices([1, 2, 3, 4], [0.66, 0.08, 0.06, 0.20])[0]
            values[key] = [materials.new_value(rng, value_kind) for _ in range(count)]
    return values


def _ask(rng: random.Random, values: dict[str, list[str]], value_kind: str, task: str, most: int) -> list[Turn]:
    """At most `most` questions: for one key's values, or for the only value of each of several keys; no key twice."""
    pool = list(values)
    rng.shuffle(pool)
    turns: list[Turn] = []
    while pool and len(turns) < most:
        keys = [pool.pop()]
        if len(values[keys[0]]) == 1 and rng.random() < 0.25:
            more = [key for key in pool if len(values[key]) == 1][: rng.choice([1, 2, 3, 3, 3, 3])]
            keys += more
            pool = [key for key in pool if key not in more]
        answers = [value for key in keys for value in values[key]]
        single = len(answers) == 1
        suffix = "" if single else "_keys" if len(keys) > 1 else "_values"
        turns.append(Turn(word_niah(value_kind, keys, single), f" {word_list(answers)}.", task + suffix))
    return turns


def _weave(rng: random.Random, units: list[str], needles: list[str]) -> list[str]:
    """Needles, in their order, at random places between the units."""
    woven = list(units)
    places = sorted(rng.randint(0, len(units)) for _ in needles)
    for inserted, (place, needle) in enumerate(zip(places, needles, strict=True)):
        woven.insert(place + inserted, needle)
    return woven
