"""The samples of a task as rows of RULER's data files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from .common_words import CommonWords
from .freq_words import FrequentWords
from .generator import Generator, Setting
from .niah import Needles
from .qa import QuestionAnswering
from .sizing import fitting_example, largest_units
from .variable_tracking import VariableTracking

GENERATORS: dict[str, Callable[[Setting], Generator]] = {
    "niah": Needles,
    "variable_tracking": VariableTracking,
    "common_words_extraction": CommonWords,
    "freq_words_extraction": FrequentWords,
    "qa": QuestionAnswering,
}


def make_rows(setting: Setting, samples: int) -> list[dict[str, Any]]:
    """`samples` rows, the same ones on every call; fewer, told on stderr, where a task has not that many questions.

    A row has upstream's newer fields: index, input (without the answer prefix), outputs, length (tokens of the prompt
    and of the answer to come), length_w_model_temp (the same, as the chat template is part of the input),
    answer_prefix, and for niah token_position_answer (tokens before the first answer).
    Raises ValueError for a length below the task's minimum.
    """
    name = setting.spec.name
    generator = GENERATORS[setting.spec.generator](setting)
    if generator.samples is not None and generator.samples < samples:
        print(f"{name}: {samples} samples asked for, the file has {generator.samples} questions", file=sys.stderr)
        samples = generator.samples
    units = largest_units(generator)
    if generator.limit is not None and units + generator.step > generator.limit:
        print(f"{name}: {units} of {generator.limit} units used, prompts may be shorter than asked", file=sys.stderr)
    rows = []
    for index in tqdm(range(samples), desc=f"{name} {setting.length}: data", unit="sample", disable=None, leave=False):
        example, length = fitting_example(generator, units, index)
        row: dict[str, Any] = {
            "index": index,
            "input": example.input,
            "outputs": example.outputs,
            "length": length,
            "length_w_model_temp": length,
            "answer_prefix": example.answer_prefix,
        }
        if setting.spec.generator == "niah":
            before = example.input[: example.input.find(example.outputs[0])]
            row["token_position_answer"] = setting.count(before)
        rows.append(row)
    return rows
