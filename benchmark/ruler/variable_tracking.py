"""Variable tracking: a chain of assignments hidden in repeated noise lines, after one worked example."""

from __future__ import annotations

import random
import re
import string
from dataclasses import replace
from itertools import pairwise

import numpy as np

from .chat import ChatTemplate, fill
from .generator import Example, Generator, Setting
from .sizing import fitting_example, largest_units
from .specs import STRINGS

_WORKED_LENGTH = 500
_WORKED_VALUE = "12345"
_KEYWORD = "VAR"


class Chain(Generator):
    """A question about one chain. Units: noise lines."""

    name_length = 5

    def __init__(self, setting: Setting, rng: random.Random, values: np.random.RandomState, step: int) -> None:
        self.hops = setting.spec.args["hops"]
        super().__init__(setting, step, minimum=self.hops + 1)
        self.rng, self.values = rng, values

    def value(self) -> str:
        return str(self.values.randint(10000, 99999))

    def names(self, taken: tuple[str, ...] = ()) -> list[str]:
        """Distinct random capitals."""
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(self.rng.choices(string.ascii_uppercase, k=self.name_length))
            if name not in names and name not in taken:
                names.append(name)
        return names

    def example(self, units: int, index: int) -> Example:
        names, value = self.names(taken=(_KEYWORD,)), self.value()
        lines = [STRINGS["noise"]] * units
        chain = [fill(STRINGS["variable_first"], name=names[0], value=value)]
        chain += [fill(STRINGS["variable_next"], name=name, previous=previous) for previous, name in pairwise(names)]
        places = sorted(self.rng.sample(range(units), len(chain)))
        for inserted, (place, assignment) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + inserted, assignment)
        return self.write(names, context="\n".join(lines), query=value, num_v=str(len(names)))


class WorkedExample(Chain):
    """The example before the question: short names, a fixed value, no chat template, an answer."""

    name_length = 3

    def __init__(self, setting: Setting, rng: random.Random, values: np.random.RandomState) -> None:
        plain = replace(setting, chat=ChatTemplate("base", "", ""), length=_WORKED_LENGTH, special_tokens=0)
        super().__init__(plain, rng, values, step=5)
        self.new_tokens = 0
        example, _ = fitting_example(self, largest_units(self), 0)
        self.outputs = example.outputs
        self.text = f"{example.prompt} {' '.join(example.outputs)}\n"

    def value(self) -> str:
        return _WORKED_VALUE

    def renamed(self, value: str) -> str:
        """The same example with other names and another value."""
        other = dict(zip(self.outputs, self.names(taken=(_KEYWORD,)), strict=True))
        other[_WORKED_VALUE] = value
        return re.sub("|".join(other), lambda match: other[match[0]], self.text)


class VariableTracking(Chain):
    """The task: a chain's question, the worked example before it inside the chat template."""

    def __init__(self, setting: Setting) -> None:
        rng, values = random.Random(setting.seed), np.random.RandomState(setting.seed)
        self.worked = WorkedExample(setting, rng, values)
        super().__init__(setting, rng, values, step=10 if setting.length >= 4096 else 5)
        self.extra_tokens = setting.count(self.worked.text)

    def draft(self, units: int) -> Example:
        return super().example(units, 0)

    def example(self, units: int, index: int) -> Example:
        question = super().example(units, index)
        worked = self.worked.renamed(str(self.values.randint(10000, 99999)))
        head = self.setting.chat.head
        text = f"{head}{worked}\n{question.input[len(head) :]}"
        return Example(text, question.answer_prefix, question.outputs)
