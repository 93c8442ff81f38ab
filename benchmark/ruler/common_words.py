"""Common words extraction: a numbered list in which ten words come more often, after one worked example."""

from __future__ import annotations

from dataclasses import dataclass

from .generator import Example, Generator, Setting

_PROBE_UNITS = 4096


@dataclass(frozen=True)
class _Repeats:
    """words: how many different ones the worked example has; the other two: how often a word comes."""

    words: int
    common: int
    rest: int


class CommonWords(Generator):
    """Units: different words. The list ends with the word lists (8,169 words, about 130K tokens)."""

    def __init__(self, setting: Setting) -> None:
        args = setting.spec.args
        self.common = args["common"]
        if setting.length >= 4096:
            self.worked, self.repeats = _Repeats(40, 10, 3), (args["common_repeats"], args["rest_repeats"])
        else:
            self.worked, self.repeats = _Repeats(20, 3, 1), (6, 1)
        super().__init__(setting, step=10, minimum=self.common)
        self.words = self.shuffled(list(setting.sources.words.all_words))
        self.limit = len(self.words)
        self.probe_units = min(_PROBE_UNITS, self.limit)

    def most_units(self, tokens_per_unit: float) -> int:
        return int(self.setting.length // tokens_per_unit) * 2

    def example(self, units: int, index: int) -> Example:
        context, common = self._numbered(self.worked.words, self.worked.common, self.worked.rest)
        worked = f"{self.write([], context=context).prompt} {_listed(common)}\n"
        context, outputs = self._numbered(units, *self.repeats)
        question = self.write(outputs, context=context)
        return Example(worked + question.input, question.answer_prefix, outputs)

    def _numbered(self, count: int, common_repeats: int, rest_repeats: int) -> tuple[str, list[str]]:
        chosen = self.rng.sample(self.words, count)
        common, rest = chosen[: self.common], chosen[self.common :]
        return _listed(self.shuffled(common * common_repeats + rest * rest_repeats)), common


def _listed(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
