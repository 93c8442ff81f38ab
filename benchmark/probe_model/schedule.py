"""What is trained when: shares of lengths and families over the run, and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

_ONE_QUESTION_FAMILIES = ("cwe", "fwe")


@dataclass(frozen=True)
class Phase:
    """A part of the run from `start` (0 to 1) on: shares of steps by length in tokens, of sequences by family."""

    start: float
    lengths: dict[int, float]
    families: dict[str, float]

    def lengths_up_to(self, longest: int) -> dict[int, float]:
        """The lengths that are not above `longest`; `longest` itself where all are."""
        return {length: share for length, share in self.lengths.items() if length <= longest} or {longest: 1.0}

    def families_at(self, length: int) -> dict[str, float]:
        """Families with one question a sequence are rarer where a step has only one or two sequences."""
        factor = 0.6 if length >= 32768 else 1.0
        return {
            family: share * (factor if family in _ONE_QUESTION_FAMILIES else 1.0)
            for family, share in self.families.items()
        }


_LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
_FAMILIES = ("text", "noise", "mk2", "mk3", "mkx", "vt", "cwe", "fwe")
# As the adapter was trained: set by hand while its 1,000 seconds ran. Start, shares of the lengths, of the families.
_SHARES = (
    (0.0, (0.15, 0.50, 0.35, 0, 0, 0), (0.38, 0.05, 0.15, 0.11, 0.02, 0.13, 0.08, 0.08)),
    (0.13, (0, 0.22, 0.25, 0.32, 0.16, 0.05), (0.38, 0.04, 0.08, 0.08, 0.01, 0.14, 0.16, 0.11)),
    (0.19, (0, 0.20, 0.20, 0.27, 0.23, 0.10), (0.36, 0.03, 0.06, 0.07, 0.01, 0.14, 0.22, 0.11)),
    (0.455, (0, 0.12, 0.14, 0.24, 0.30, 0.20), (0.38, 0.03, 0.06, 0.10, 0.02, 0.11, 0.20, 0.10)),
    (0.743, (0, 0.10, 0.12, 0.22, 0.30, 0.26), (0.39, 0.03, 0.06, 0.10, 0.02, 0.13, 0.18, 0.09)),
)
PHASES = tuple(
    Phase(
        start,
        {length: share for length, share in zip(_LENGTHS, lengths, strict=True) if share},
        dict(zip(_FAMILIES, families, strict=True)),
    )
    for start, lengths, families in _SHARES
)


def phase_at(progress: float) -> Phase:
    """The phase of a moment; progress: share of the run that is over, 0 to 1."""
    return [phase for phase in PHASES if phase.start <= progress][-1]


def learning_rate(peak: float, warmup_steps: int, step: int, progress: float) -> float:
    """Linear warm-up in steps, times a cosine over the run from `peak` down to 5 % of it."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * min(1.0, (step + 1) / warmup_steps) * (0.05 + 0.95 * cosine)
