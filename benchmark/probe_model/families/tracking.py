"""Variable tracking: chains of assignments hidden in noise lines, mostly after a worked example, as vt has them."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass, replace

from benchmark.ruler.chat import fill
from benchmark.ruler.specs import STRINGS

from ..materials import Materials
from ..sequences import Sequence, Turn, count_tokens, encode_prompt, encode_turns, join
from ..wording import NOISE, ChatStyle, Wording, word_task

_NOISE_TOKENS = 25
_ASSIGNMENT_TOKENS = 14
_WORKED_TOKENS = 480
_WORKED_NOISE = 12
_FRAME_TOKENS = 130
_ATTEMPTS = 6


@dataclass(frozen=True)
class Chain:
    """Names that all stand for `value`, the first directly, each other one through the name before it."""

    names: list[str]
    value: str

    @property
    def lines(self) -> list[str]:
        first = fill(STRINGS["variable_first"], name=self.names[0], value=self.value)
        links = zip(self.names[1:], self.names, strict=False)
        return [first, *(fill(STRINGS["variable_next"], name=name, previous=before) for name, before in links)]

    @property
    def wording(self) -> Wording:
        return word_task("vt", query=self.value, num_v=str(len(self.names)))


def variable_chains(materials: Materials, rng: random.Random, length: int, style: ChatStyle) -> Sequence | None:
    """1 to 12 chains of 2 to 6 hops, all of one length, and a question for each."""
    hops = 4 if rng.random() < 0.8 else rng.randint(2, 6)
    chains = _draw_chains(rng, hops, 1 if rng.random() < 0.45 else rng.randint(1, max(1, min(12, length // 700))))
    # The prefix ends with a blank, which a tokenizer would join to the answer: some answers have it instead.
    blank_in_answer = rng.random() < 0.12
    asked = list(chains)
    rng.shuffle(asked)
    turns = [_turn(chain, "vt" if len(chains) == 1 else "vt_chains", blank_in_answer) for chain in asked]
    tail = encode_turns(materials, style, turns)
    room = length - count_tokens(tail)
    worked = _worked_example(rng, hops) if rng.random() < 0.9 else ""
    wording = replace(turns[0].wording, intro=worked + turns[0].wording.intro)
    assignments = len(chains) * (hops + 1)
    taken = (_WORKED_TOKENS if worked else 0) + _FRAME_TOKENS + assignments * _ASSIGNMENT_TOKENS
    lines = (room - taken) // _NOISE_TOKENS
    for _ in range(_ATTEMPTS):
        context = _scatter(rng, max(lines, assignments), chains)
        prompt = encode_prompt(materials, style, wording, context)
        if len(prompt) <= room:
            return join(prompt, tail)
        lines -= (len(prompt) - room) // _NOISE_TOKENS + 2
    return None


def _turn(chain: Chain, task: str, blank_in_answer: bool) -> Turn:
    wording, answer = chain.wording, " ".join(chain.names)
    if blank_in_answer:
        return Turn(replace(wording, answer_prefix=wording.answer_prefix.rstrip(" ")), f" {answer}", task)
    return Turn(wording, answer, task)


def _draw_chains(rng: random.Random, hops: int, count: int) -> list[Chain]:
    """Chains without a name or value in common."""
    chains: list[Chain] = []
    used: set[str] = set()
    while len(chains) < count:
        chain = _draw_chain(rng, hops)
        if not used & {chain.value, *chain.names}:
            used |= {chain.value, *chain.names}
            chains.append(chain)
    return chains


def _draw_chain(rng: random.Random, hops: int, letters: int = 5) -> Chain:
    names: list[str] = []
    while len(names) < hops + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    return Chain(names, str(rng.randint(10000, 99998)))


def _scatter(rng: random.Random, noise_lines: int, chains: list[Chain]) -> str:
    """Noise lines with the chains' lines, each chain in its order, at random places."""
    lines = [NOISE] * noise_lines
    for chain in chains:
        places = sorted(rng.sample(range(len(lines)), len(chain.names)))
        for inserted, (place, line) in enumerate(zip(places, chain.lines, strict=True)):
            lines.insert(place + inserted, line)
    return "\n".join(lines)


def _worked_example(rng: random.Random, hops: int) -> str:
    """A short chain with its question and answer, about the 500 tokens that RULER gives it."""
    chain = _draw_chain(rng, hops, letters=3)
    wording = chain.wording
    message = wording.message(_scatter(rng, _WORKED_NOISE, [chain]))
    return f"{message}{wording.answer_prefix} {' '.join(chain.names)}\n\n"
