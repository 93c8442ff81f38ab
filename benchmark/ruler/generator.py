"""What the generators have in common: an example of a number of units, and the numbers that fitting needs."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .chat import ChatTemplate, fill, singular
from .sources import Sources
from .specs import TaskSpec


@dataclass(frozen=True)
class Setting:
    """For which task and prompt format samples are made.

    length: tokens of prompt and answer together, which no sample exceeds. count: tokens of a text, no special ones
    added. special_tokens: how many the tokenizer will add. sizing: "bisect" or "step", see `sizing`.
    """

    spec: TaskSpec
    chat: ChatTemplate
    length: int
    count: Callable[[str], int]
    sources: Sources
    seed: int = 42
    sizing: str = "bisect"
    special_tokens: int = 0


@dataclass(frozen=True)
class Example:
    """`input`, chat template included, and `answer_prefix` together are the prompt; `outputs` are the references."""

    input: str
    answer_prefix: str
    outputs: list[str]

    @property
    def prompt(self) -> str:
        return self.input + self.answer_prefix


class Generator(ABC):
    """Makes the samples of a task out of one stream of random numbers, drawn in upstream's order.

    step: units by which sizes are changed; minimum: fewest units of a sample; limit: most units, None for no limit;
    probe_units: size of the draft from which bisection learns the tokens per unit; start: where steps begin;
    counts_answers: steps count the references with the prompt, as older RULER did; extra_tokens: what a sample has
    beside its draft; samples: how many different ones there are, None for no limit.
    """

    extra_tokens = 0
    counts_answers = True
    limit: int | None = None
    samples: int | None = None

    def __init__(self, setting: Setting, step: int, minimum: int) -> None:
        self.setting = setting
        self.step = step
        self.minimum = minimum
        self.probe_units = step
        self.start = step
        self.sizing = setting.sizing
        self.new_tokens = setting.spec.new_tokens
        self.rng = random.Random(setting.seed)

    @abstractmethod
    def example(self, units: int, index: int) -> Example:
        """Sample number `index` with so many units of haystack; a new random one on every call."""

    def draft(self, units: int) -> Example:
        """What is measured to find the right size."""
        return self.example(units, 0)

    def most_units(self, tokens_per_unit: float) -> int:
        """Where bisection begins, from above."""
        return int(self.setting.length / tokens_per_unit * 3)

    def tokens(self, prompt: str) -> int:
        """Tokens of a prompt and of the answer to come."""
        return self.setting.count(prompt) + self.setting.special_tokens + self.new_tokens

    def shuffled(self, items: list[Any]) -> list[Any]:
        """Shuffled in place, always with the task's own seed: the same permutation for equal counts."""
        random.Random(self.setting.seed).shuffle(items)
        return items

    def write(self, outputs: list[str], single: bool = False, **slots: str) -> Example:
        """The example with these slots; `single`: in the singular form."""
        rewrite = singular if single else str
        spec, chat = self.setting.spec, self.setting.chat
        text = rewrite(chat.head + spec.template + chat.tail)
        return Example(fill(text, **slots), fill(rewrite(spec.answer_prefix), **slots), outputs)
