"""From LongBench's records to the runner's samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmark.runner import Sample, Task

from .catalog import MAX_NEW_TOKENS, PROMPTS
from .protocols import Protocol
from .scoring import sample_scores


def format_prompt(dataset: str, record: Mapping[str, Any]) -> str:
    """LongBench's prompt of a record, whole and without a chat template."""
    return PROMPTS[dataset].format(**record)


def truncate_middle(tokenizer: Any, prompt: str, max_length: int | None) -> tuple[str, bool]:
    """The prompt, and whether its middle was cut out (LongBench's pred.py).

    A prompt of more than max_length tokens, the tokenizer's own special ones included, becomes its first and its last
    int(max_length / 2) tokens, each decoded without special tokens. The text in between may tokenize differently.
    """
    if max_length is None:
        return prompt, False
    ids = tokenizer(prompt).input_ids
    if len(ids) <= max_length:
        return prompt, False
    half = int(max_length / 2)
    ends = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return "".join(ends), True


def make_task(dataset: str, records: Sequence[Mapping[str, Any]], tokenizer: Any, protocol: Protocol) -> Task:
    """The runner's task of a dataset: one sample a record, named by its _id."""
    samples = [_sample(dataset, record, tokenizer, protocol) for record in records]
    return Task(dataset, samples, partial(sample_scores, dataset))


def check_room(tasks: Sequence[Task], tokenizer: Any, window: int) -> None:
    """ValueError naming the first sample whose prompt and answer do not fit into the model's window."""
    for task in tasks:
        for sample in task.samples:
            length = len(tokenizer(sample.prompt, add_special_tokens=sample.special_tokens).input_ids)
            if length + sample.max_new_tokens > window:
                raise ValueError(
                    f"{task.name}, sample {sample.id}: {length} tokens and {sample.max_new_tokens} new ones do not fit "
                    f"into the model's {window}; allowed: a smaller max_length, or a protocol that cuts prompts"
                )


def _sample(dataset: str, record: Mapping[str, Any], tokenizer: Any, protocol: Protocol) -> Sample:
    prompt, truncated = truncate_middle(tokenizer, format_prompt(dataset, record), protocol.max_length)
    templated = protocol.uses_template(dataset)
    return Sample(
        id=record["_id"],
        prompt=protocol.with_template(prompt, tokenizer) if templated else prompt,
        expected=list(record["answers"]),
        max_new_tokens=MAX_NEW_TOKENS[dataset],
        special_tokens=not templated,
        stop_ids=protocol.stop_ids(dataset),
        min_new_tokens=protocol.min_new_tokens(dataset),
        extra={
            **{key: record[key] for key in ("dataset", "language", "length", "all_classes")},
            "truncated": truncated,
        },
    )
