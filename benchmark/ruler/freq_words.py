"""Frequent words extraction: made-up words whose frequencies follow a zeta distribution."""

from __future__ import annotations

import string

from .generator import Example, Generator, Setting
from .sizing import too_short
from .specs import STRINGS

_TOKENS_PER_WORD = 50
_SIZING = -1
_ASKED = 3


class FrequentWords(Generator):
    """Units: words of text. Always sized by steps, as upstream does: one vocabulary for all probes and one for every
    sample, so that a sample which is too long shrinks with its own words."""

    counts_answers = False

    def __init__(self, setting: Setting) -> None:
        self.word_length, self.alpha = setting.spec.args["word_length"], setting.spec.args["alpha"]
        room = setting.length - setting.spec.new_tokens
        self.vocabulary_size = room // _TOKENS_PER_WORD
        if self.vocabulary_size <= _ASKED:
            raise too_short(setting, (_ASKED + 1) * _TOKENS_PER_WORD + setting.spec.new_tokens)
        # 53 words are the first number at which the third asked word comes twice and the next one once
        super().__init__(setting, step=max(1, room // 32), minimum=53)
        self.sizing = "step"
        self.start = max(room // self.word_length, self.minimum)
        self._vocabulary: list[str] = []
        self._drawn_for: int | None = None

    def draft(self, units: int) -> Example:
        return self.example(units, _SIZING)

    def example(self, units: int, index: int) -> Example:
        if self._drawn_for != index:
            self._vocabulary, self._drawn_for = self._draw_vocabulary(), index
        zeta = _zeta(self.alpha)
        text = [
            word for rank, word in enumerate(self._vocabulary, 1) for _ in range(int(units * rank**-self.alpha / zeta))
        ]
        return self.write(self._vocabulary[1 : 1 + _ASKED], context=" ".join(self.shuffled(text)))

    def _draw_vocabulary(self) -> list[str]:
        words: set[str] = set()
        while len(words) < self.vocabulary_size:
            words.add("".join(self.rng.choices(string.ascii_lowercase, k=self.word_length)))
        return [STRINGS["fwe_top_word"], *self.shuffled(sorted(words))[1:]]


def _zeta(alpha: float, terms: int = 1000) -> float:
    """Riemann's zeta function: a partial sum and the first terms of Euler and Maclaurin's remainder."""
    rest = terms ** (1 - alpha) / (alpha - 1) - terms**-alpha / 2 + alpha * terms ** (-alpha - 1) / 12
    return sum(rank**-alpha for rank in range(1, terms + 1)) + rest
