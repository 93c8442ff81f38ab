"""The settings of a training run, and what makes them invalid."""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST = 1024


@dataclass(frozen=True)
class TrainSettings:
    """How the adapter is trained; the defaults are those of model_hub/adapters/smollm2-135m-64k.

    seconds: length of the run, over which schedule and learning rate are spread; 0 means `steps` instead, which repeats
    exactly on one machine. tokens_per_step: sequences times length. max_length: longer ones of the schedule are left
    out. Raises ValueError for settings that cannot work.
    """

    seconds: float = 1000.0
    steps: int = 0
    seed: int = 1
    tokens_per_step: int = 65536
    max_length: int = 65536
    rank: int = 24
    alpha: int = 48
    peak_rate: float = 1e-3
    warmup_steps: int = 40
    rope_theta: float = 3e6
    max_positions: int = 65536

    def __post_init__(self) -> None:
        if self.seconds < 0 or self.steps < 0 or (self.seconds > 0) == (self.steps > 0):
            raise ValueError(
                f"seconds, steps: got {self.seconds} and {self.steps}, allowed: one of them above 0, the other 0"
            )
        if not SHORTEST <= self.max_length <= self.max_positions:
            raise ValueError(f"max_length: got {self.max_length}, allowed: {SHORTEST} to {self.max_positions}")
        if self.tokens_per_step < self.max_length:
            raise ValueError(
                f"tokens_per_step: got {self.tokens_per_step}, allowed: max_length ({self.max_length}) or more"
            )

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is over after so many steps and seconds."""
        return step / self.steps if self.steps else seconds / self.seconds
