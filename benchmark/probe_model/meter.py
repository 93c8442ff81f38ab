"""How well answers are predicted while training: running means by kind of question and length."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .batches import Batch

_LOSS_DECAY = 0.97
_ANSWER_DECAY = 0.98


@dataclass
class _Mean:
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, decay: float) -> None:
        self.total = self.total * decay + value
        self.weight = self.weight * decay + 1

    @property
    def value(self) -> float:
        return self.total / self.weight


@dataclass
class AnswerMeter:
    """Decaying means of the loss, of wholly right answers, and of right answer tokens."""

    loss: _Mean = field(default_factory=_Mean)
    _answers: dict[tuple[str, int], _Mean] = field(default_factory=lambda: defaultdict(_Mean))
    _tokens: dict[tuple[str, int], _Mean] = field(default_factory=lambda: defaultdict(_Mean))

    def add(self, batch: Batch, loss: Tensor, wrong: Tensor) -> None:
        """loss []; wrong [answers]: how many tokens of each answer were not the likeliest, given those before."""
        self.loss.add(float(loss), _LOSS_DECAY)
        length = batch.ids.shape[1]
        for task, tokens, errors in zip(batch.tasks, np.bincount(batch.owners), wrong.tolist(), strict=True):
            self._answers[task, length].add(float(errors == 0), _ANSWER_DECAY)
            self._tokens[task, length].add(1 - errors / tokens, _ANSWER_DECAY)

    def table(self) -> str:
        """Per cent of right answers / of right tokens; a row a kind of question, a column a length."""
        tasks = sorted({task for task, _ in self._answers})
        lengths = sorted({length for _, length in self._answers})
        lines = ["right answers / tokens, %".ljust(26) + "".join(f"{length:>9}" for length in lengths)]
        for task in tasks:
            cells = [self._cell((task, length)) for length in lengths]
            lines.append(task.ljust(26) + "".join(f"{cell:>9}" for cell in cells))
        return "\n".join(lines)

    def _cell(self, key: tuple[str, int]) -> str:
        if key not in self._answers:
            return "-"
        return f"{100 * self._answers[key].value:.0f}/{100 * self._tokens[key].value:.0f}"
