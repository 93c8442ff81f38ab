"""Training sequences: one haystack and question/answer turns over it, as token ids with the answers marked."""

from __future__ import annotations

from dataclasses import dataclass

from .materials import Materials
from .wording import END, ChatStyle, Wording


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `task` names the kind of question for the training log."""

    wording: Wording
    answer: str
    task: str


@dataclass(frozen=True)
class Segment:
    """Token ids between two places; `task` is None where they are no answer."""

    ids: list[int]
    task: str | None = None


@dataclass(frozen=True)
class Answer:
    """Tokens [start, end) of a sequence, the end token included; the loss is taken on these alone."""

    task: str
    start: int
    end: int


@dataclass(frozen=True)
class Sequence:
    """Token ids and the answers in them, in order."""

    ids: list[int]
    answers: list[Answer]


def encode_turns(materials: Materials, style: ChatStyle, turns: list[Turn]) -> list[Segment]:
    """Everything behind the beginning of the first answer."""
    segments: list[Segment] = []
    for turn in turns:
        if segments:
            asked = style.later(turn.wording.question) + turn.wording.answer_prefix
            segments.append(Segment(materials.encode(asked)))
        segments.append(Segment(materials.encode(turn.answer + END), turn.task))
    return segments


def count_tokens(segments: list[Segment]) -> int:
    return sum(len(segment.ids) for segment in segments)


def encode_prompt(materials: Materials, style: ChatStyle, wording: Wording, context: str) -> list[int]:
    """The first turn up to the beginning of its answer: what an evaluation prompt looks like."""
    return materials.encode(style.first(wording.message(context)) + wording.answer_prefix)


def join(prompt: list[int], segments: list[Segment]) -> Sequence:
    """The sequence of a prompt and what encode_turns made."""
    ids, answers = list(prompt), []
    for segment in segments:
        if segment.task is not None:
            answers.append(Answer(segment.task, len(ids), len(ids) + len(segment.ids)))
        ids += segment.ids
    return Sequence(ids, answers)
