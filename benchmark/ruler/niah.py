"""Needles in a haystack of essays, of one repeated line, or of other needles: the eight niah tasks."""

from __future__ import annotations

import uuid

from .chat import fill
from .generator import Example, Generator, Setting
from .specs import STRINGS

# numpy's round(linspace(0, 100, 40)): RULER's needle depths in percent of the sentences
DEPTHS = [round(100 * i / 39) for i in range(40)]


class Needles(Generator):
    """Units: words of essays, or lines."""

    def __init__(self, setting: Setting) -> None:
        args = setting.spec.args
        self.haystack, self.key, self.value = args["haystack"], args["key"], args["value"]
        self.queries, self.values = args["queries"], args["values"]
        self.keys = max(args["keys"], self.queries)
        step = 500 if self.haystack == "essay" else 25 if setting.length >= 4096 else 5
        super().__init__(setting, step, minimum=self.keys * self.values)
        if self.haystack == "essay" and self.sizing == "step":
            self.limit = setting.sources.essays.word_count

    def example(self, units: int, index: int) -> Example:
        keys, values = [], []
        for _ in range(self.keys):
            keys.append(self._draw(self.key))
            values.append([self._draw(self.value) for _ in range(self.values)])
        needles = self.shuffled(
            [self._needle(key, value) for key, own in zip(keys, values, strict=True) for value in own]
        )
        context = self._in_essays(units, needles) if self.haystack == "essay" else self._in_lines(units, needles)
        asked = self.rng.sample(range(self.keys), self.queries)
        names = [keys[i] for i in asked]
        outputs = [value for i in asked for value in values[i]]
        single = self.queries * self.values == 1
        return self.write(
            outputs,
            single,
            context=context,
            query=f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0],
            type_needle_v=self.value[:-1] if single else self.value,
        )

    def _in_essays(self, words: int, needles: list[str]) -> str:
        sentences = self.setting.sources.essays.sentences(words)
        depths = self.rng.sample(DEPTHS, len(needles))
        places = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
        pieces = []
        for start, end, needle in zip([0, *places], places, needles, strict=False):
            pieces += [" ".join(sentences[start:end]), needle]
        return " ".join([*pieces, " ".join(sentences[places[-1] :])])

    def _in_lines(self, count: int, needles: list[str]) -> str:
        if self.haystack == "noise":
            lines = [STRINGS["noise"]] * count
        else:
            lines = [self._needle(self._draw(self.key), self._draw(self.value)) for _ in range(count)]
        places = sorted(self.rng.sample(range(count), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _needle(self, key: str, value: str) -> str:
        return fill(STRINGS["needle"], type_needle_v=self.value, key=key, value=value)

    def _draw(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.rng.randint(10**6, 10**7 - 1))
        if kind == "words":
            return self.rng.choice(self.setting.sources.words.pairs)
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
