"""Runs samples through strategies: one prefill for all of them, one record a sample, and a kill loses nothing.

Layout of a results folder:

    protocol.json                    what was asked, how and of what; other settings refuse to mix
    parts/<strategy>/<task>.<rank>.jsonl   a line a finished sample, appended by one process
    <strategy>/<task>.jsonl          records in the samples' order, written whole when the last sample is there
    <strategy>/<task>.timing.jsonl   seconds of the same samples, which differ from run to run
    results.json                     scores, mean costs, protocol, environment
    .lock                            held by the process that writes the final files
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from config import RetroInferConfig
from model_hub import LLM, GenerationTiming

from .launcher import Shard
from .measure import record
from .results import environment, locked, write_json, write_text
from .shared_builds import PrefilledCaches

_TIMINGS = (
    "prefill_seconds",
    "build_seconds",
    "build_seconds_by_stage",
    "decode_seconds",
    "ms_per_token",
    "ms_by_stage",
    "peak_memory_bytes",
)
# of records, in results.json; those of earlier versions may lack estimated_share
MEAN_COSTS = ("attended_share", "estimated_share", "scored_share", "index_bytes", "kv_bytes", "recall", "mass")


@dataclass(frozen=True)
class Sample:
    """One prompt. `prompt` is the complete text; `special_tokens` lets the tokenizer add its own to it. The answer ends
    behind `max_new_tokens`, or with a token of `stop_ids`, which is not among the first `min_new_tokens`. `expected`:
    references as the scorer takes them. `extra` goes into the record unchanged."""

    id: str
    prompt: str
    expected: list[str]
    max_new_tokens: int
    special_tokens: bool = False
    stop_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Samples and how their records are scored: `score(records)` gives one number from 0 to 100 for each."""

    name: str
    samples: list[Sample]
    score: Callable[[list[dict[str, Any]]], list[float]]


def run_tasks(
    llm: LLM,
    tokenizer: Any,
    tasks: list[Task],
    strategies: list[str],
    attn_config: dict[str, Any],
    folder: Path,
    protocol: dict[str, Any],
    *,
    batch_size: int = 1,
    diagnose: bool = False,
    shard: Shard | None = None,
) -> None:
    """Generates what is missing in `folder` for every task, sample and strategy, then writes the final files.

    strategies: names, or variants as with_estimation reads them.
    attn_config: {"RetroInfer": {..}}, as generate_config makes it, for all strategies; its `core` threads are shared by
    the processes of one machine. batch_size: samples of equal
    length that are run together. Raises ValueError where `folder` holds results of another protocol, where two tasks or
    two samples of a task have one name, or for a damaged part file (not its last line, which a kill may cut).
    """
    shard = shard or Shard.of_launcher()
    _check_names(tasks)
    settings = RetroInferConfig(**attn_config["RetroInfer"])
    # Threads change no result: a run may go on on another machine.
    lasting = {key: value for key, value in attn_config["RetroInfer"].items() if key != "core"}
    keep_protocol(folder, json.loads(json.dumps({**protocol, "diagnose": diagnose, "RetroInfer": lasting})))
    settings = settings.model_copy(update={"core": max(settings.core // shard.local_world, 1)})
    for number, task in enumerate(tasks):
        _mend(folder, strategies, task, shard)
        done = {strategy: _finished(folder, strategy, task) for strategy in strategies}
        mine = shard.share(task.samples, sum(len(earlier.samples) for earlier in tasks[:number]))
        missing = [sample for sample in mine if any(sample.id not in done[strategy] for strategy in strategies)]
        with tqdm(
            total=len(mine), initial=len(mine) - len(missing), desc=task.name, unit="sample", disable=None
        ) as bar:
            for batch in _equal_batches(missing, tokenizer, batch_size):
                wanted = [s for s in strategies if any(sample.id not in done[s] for sample, _ in batch)]
                for strategy, lines in _generate(llm, tokenizer, batch, wanted, settings, diagnose):
                    fresh = [line for line in lines if line["record"]["id"] not in done[strategy]]
                    _append(_part(folder, strategy, task, shard), fresh)
                bar.update(len(batch))
        with locked(folder):
            for strategy in strategies:
                finish(folder, strategy, task)
    with locked(folder):
        write_results(folder, tasks, strategies)


def keep_protocol(folder: Path, protocol: dict[str, Any]) -> None:
    """Writes protocol.json, or compares with the one that is there. ValueError names the settings that differ."""
    path = folder / "protocol.json"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not path.exists():
            write_json(path, protocol)
            return
        earlier = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(key for key in {*earlier, *protocol} if earlier.get(key) != protocol.get(key))
    if differing:
        told = "; ".join(f"{key}: {earlier.get(key)!r} there, {protocol.get(key)!r} now" for key in differing)
        raise ValueError(f"{folder} holds results of another protocol ({told}); give another folder")


def finish(folder: Path, strategy: str, task: Task) -> bool:
    """Writes the final files of a task whose samples are all there, in their order; says whether they were."""
    done = _finished(folder, strategy, task)
    if any(sample.id not in done for sample in task.samples):
        return False
    lines = [done[sample.id] for sample in task.samples]
    (folder / strategy).mkdir(exist_ok=True)
    for suffix, part in (("jsonl", "record"), ("timing.jsonl", "timing")):
        text = "".join(json.dumps(line[part], ensure_ascii=False) + "\n" for line in lines)
        write_text(folder / strategy / f"{task.name}.{suffix}", text)
    return True


def read_records(folder: Path, strategy: str, task: str) -> list[dict[str, Any]] | None:
    """Records of a finished task in the samples' order, None where it is not finished."""
    path = folder / strategy / f"{task}.jsonl"
    if not path.exists():
        return None
    # splitlines() would also split at line separators inside an answer.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_results(folder: Path, tasks: list[Task], strategies: list[str]) -> None:
    """results.json: for every strategy and finished task the score, the samples' own scores and the mean costs; what
    earlier runs of other tasks and strategies wrote stays."""
    path = folder / "results.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    scored: dict[str, dict[str, Any]] = {**earlier, **{name: dict(earlier.get(name, {})) for name in strategies}}
    for strategy in strategies:
        for task in tasks:
            records = read_records(folder, strategy, task.name)
            if not records:
                continue
            scores = task.score(records)
            means = {
                key: sum(float(record[key]) for record in records) / len(records)
                for key in MEAN_COSTS
                if all(record.get(key) is not None for record in records)
            }
            score = sum(scores) / len(scores)
            scored[strategy][task.name] = {"score": score, "samples": len(scores), "scores": scores, **means}
    protocol = json.loads((folder / "protocol.json").read_text(encoding="utf-8"))
    write_json(path, {"config": protocol, "environment": environment(), "results": scored})


def _check_names(tasks: list[Task]) -> None:
    for what, names in (
        ("tasks", [task.name for task in tasks]),
        *((f"samples of {task.name}", [sample.id for sample in task.samples]) for task in tasks),
    ):
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise ValueError(f"{what}: got {', '.join(repeated)} more than once, allowed: once each")


def _part(folder: Path, strategy: str, task: Task, shard: Shard) -> Path:
    return folder / "parts" / strategy / f"{task.name}.{shard.rank}.jsonl"


def _mend(folder: Path, strategies: list[str], task: Task, shard: Shard) -> None:
    """Cuts off the half line that a kill may have left at the end of this process's part files."""
    for strategy in strategies:
        path = _part(folder, strategy, task, shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            continue
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            write_text(path, content[: content.rfind(b"\n") + 1].decode("utf-8"))


def _finished(folder: Path, strategy: str, task: Task) -> dict[str, dict[str, Any]]:
    """Lines {"record", "timing"} of all processes' part files by sample id."""
    done: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "parts" / strategy).glob(f"{task.name}.*.jsonl")):
        text = path.read_text(encoding="utf-8")
        # Another process may be in the middle of its last line.
        for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], 1):
            try:
                parsed = json.loads(line)
                done.setdefault(parsed["record"]["id"], parsed)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a finished sample ({error}); remove the line") from None
    return done


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _equal_batches(samples: list[Sample], tokenizer: Any, batch_size: int) -> Iterator[list[tuple[Sample, list[int]]]]:
    """Samples with their token ids in batches that need no padding and end alike."""
    waiting: dict[tuple[Any, ...], list[tuple[Sample, list[int]]]] = {}
    for sample in samples:
        ids = tokenizer(sample.prompt, add_special_tokens=sample.special_tokens).input_ids
        alike = (len(ids), sample.max_new_tokens, sample.stop_ids, sample.min_new_tokens)
        batch = waiting.setdefault(alike, [])
        batch.append((sample, ids))
        if len(batch) == batch_size:
            yield waiting.pop(alike)
    yield from waiting.values()


def _generate(
    llm: LLM,
    tokenizer: Any,
    batch: list[tuple[Sample, list[int]]],
    strategies: list[str],
    settings: RetroInferConfig,
    diagnose: bool,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(strategy, a line {"record", "timing"} for every sample of the batch) after one prefill for all strategies, and
    one build for those that can share it."""
    samples, ids = [sample for sample, _ in batch], torch.tensor([tokens for _, tokens in batch])
    length, first_sample = ids.shape[1], samples[0]
    stop = first_sample.stop_ids
    start = perf_counter()
    caches = PrefilledCaches(llm, ids, strategies, settings, first_sample.max_new_tokens, diagnose)
    logits = caches.logits
    if first_sample.min_new_tokens:
        logits = logits.index_fill(1, torch.tensor(sorted(stop), device=logits.device), float("-inf"))
    first = logits.argmax(-1)
    prefill_seconds = perf_counter() - start - caches.build_seconds
    for name, cache in caches:
        start = perf_counter()
        rest = llm.decode(cache, first, first_sample.max_new_tokens - 1, stop_ids=stop)
        tokens = torch.cat((first[:, None], rest), dim=1).tolist()
        seconds = perf_counter() - start
        timing = GenerationTiming(prefill_seconds + cache.stats.seconds["build"], 0.0, seconds, rest.shape[1])
        cost = record(cache, timing)
        seconds_of = {key: cost.pop(key) for key in _TIMINGS}
        lines = []
        for sample, answer in zip(samples, tokens, strict=True):
            kept = until_stop(answer, stop)
            text = tokenizer.decode(kept, skip_special_tokens=True)
            told = {"id": sample.id, "pred": text, "expected": sample.expected, **sample.extra}
            costs = {"prompt_tokens": length, "new_tokens": len(kept), **cost}
            timings = {"id": sample.id, "batch": len(samples), **seconds_of}
            lines.append({"record": {**told, **costs}, "timing": timings})
        yield name, lines


def until_stop(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    """The tokens before the first stop token."""
    ends = [i for i, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0]] if ends else tokens
