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


# As the adapter was trained: set by hand while its 1,000 seconds ran.
PHASES = (
    Phase(
        0.0,
        {2048: 0.15, 4096: 0.50, 8192: 0.35},
        {"text": 0.38, "noise": 0.05, "mk2": 0.15, "mk3": 0.11, "mkx": 0.02, "vt": 0.13, "cwe": 0.08, "fwe": 0.08},
    ),
    Phase(
        0.13,
        {4096: 0.22, 8192: 0.25, 16384: 0.32, 32768: 0.16, 65536: 0.05},
        {"text": 0.38, "noise": 0.04, "mk2": 0.08, "mk3": 0.08, "mkx": 0.01, "vt": 0.14, "cwe": 0.16, "fwe": 0.11},
    ),
    Phase(
        0.19,
        {4096: 0.20, 8192: 0.20, 16384: 0.27, 32768: 0.23, 65536: 0.10},
        {"text": 0.36, "noise": 0.03, "mk2": 0.06, "mk3": 0.07, "mkx": 0.01, "vt": 0.14, "cwe": 0.22, "fwe": 0.11},
    ),
    Phase(
        0.455,
        {4096: 0.12, 8192: 0.14, 16384: 0.24, 32768: 0.30, 65536: 0.20},
        {"text": 0.38, "noise": 0.03, "mk2": 0.06, "mk3": 0.10, "mkx": 0.02, "vt": 0.11, "cwe": 0.20, "fwe": 0.10},
    ),
    Phase(
        0.743,
        {4096: 0.10, 8192: 0.12, 16384: 0.22, 32768: 0.30, 65536: 0.26},
        {"text": 0.39, "noise": 0.03, "mk2": 0.06, "mk3": 0.10, "mkx": 0.02, "vt": 0.13, "cwe": 0.18, "fwe": 0.09},
    ),
)


def phase_at(progress: float) -> Phase:
    """The phase of a moment; progress: share of the run that is over, 0 to 1."""
    return [phase for phase in PHASES if phase.start <= progress][-1]


def learning_rate(peak: float, warmup_steps: int, step: int, progress: float) -> float:
    """Linear warm-up in steps, times a cosine over the run from `peak` down to 5 % of it."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * min(1.0, (step + 1) / warmup_steps) * (0.05 + 0.95 * cosine)
