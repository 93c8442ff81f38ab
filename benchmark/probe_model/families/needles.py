"""Haystacks that consist of needles: multikey_2, multikey_3, and word keys with uuid values."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..materials import Materials
from ..sequences import Sequence, Turn, count_tokens, encode_prompt, encode_turns, join
from ..wording import ChatStyle, word_list, word_needle, word_niah

_FRAME_TOKENS = 120
_ATTEMPTS = 5


@dataclass(frozen=True)
class NeedleKind:
    """Kinds of key and value, and roughly how many tokens a needle and a turn have."""

    key: str
    value: str
    needle_tokens: float
    turn_tokens: float


KINDS = {
    "mk2": NeedleKind("words", "numbers", 23.5, 72),
    "mk3": NeedleKind("uuids", "uuids", 86, 160),
    "mkx": NeedleKind("words", "uuids", 58, 86),
}


def only_needles(
    materials: Materials, rng: random.Random, length: int, style: ChatStyle, family: str
) -> Sequence | None:
    """As many needles as fit, and up to 30 questions, a few of them for several keys; `family`: one of KINDS."""
    kind = KINDS[family]
    turn_count = max(3, min(30, int(length * 0.25 / kind.turn_tokens)))
    count = int((length - turn_count * kind.turn_tokens * 0.95 - _FRAME_TOKENS) / kind.needle_tokens)
    for _ in range(_ATTEMPTS):
        needles = _draw_needles(materials, rng, kind, count)
        turns = _ask(rng, rng.sample(needles, min(turn_count, count)), kind, family)
        tail = encode_turns(materials, style, turns)
        context = "\n".join(word_needle(kind.value, key, value) for key, value in needles)
        prompt = encode_prompt(materials, style, turns[0].wording, context)
        excess = len(prompt) + count_tokens(tail) - length
        if excess <= 0:
            return join(prompt, tail)
        count -= int(excess / kind.needle_tokens) + 2
    return None


def _draw_needles(materials: Materials, rng: random.Random, kind: NeedleKind, count: int) -> list[tuple[str, str]]:
    """(key, value) pairs, some keys alike."""
    needles: list[tuple[str, str]] = []
    seen: set[str] = set()
    while len(needles) < count:
        key = materials.new_key(rng, kind.key)
        if kind.key == "words" and needles and rng.random() < 0.15:
            key = materials.near_key(rng, needles[rng.randrange(len(needles))][0])
        if key not in seen:
            seen.add(key)
            needles.append((key, materials.new_value(rng, kind.value)))
    return needles


def _ask(rng: random.Random, pool: list[tuple[str, str]], kind: NeedleKind, family: str) -> list[Turn]:
    turns = []
    while pool:
        several = rng.random() < 0.08 and len(pool) >= 4
        count = rng.choice([2, 3, 4]) if several else 1
        asked, pool = pool[:count], pool[count:]
        wording = word_niah(kind.value, [key for key, _ in asked], not several)
        answer = f" {word_list([value for _, value in asked])}."
        turns.append(Turn(wording, answer, f"{family}_keys" if several else family))
    return turns
