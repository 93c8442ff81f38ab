"""A run of LongBench: data, model and protocol become tasks for the runner; its records become scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmark.results import locked, write_json
from benchmark.runner import read_records, run_tasks
from config import ATTENTION_TYPES, RetroInferConfig, resolve_strategy, with_estimation
from model_hub import load_model, load_tokenizer

from .catalog import DATASETS, METRIC
from .metrics import require_packages
from .prompting import check_room, make_task
from .protocols import PROTOCOLS, make_protocol
from .records import Skipped, read_dataset

LEFT_OUT = "left_out.json"
_CHECKED_LENGTH = 131072  # stands for the context before the model's window is known


@dataclass(frozen=True)
class Job:
    """What to run.

    strategies: names or attention types. folder: of the runner's files. attn_config: makes the configuration for a
    context length. num_examples: samples of each dataset, the first or, with a seed, drawn at random; None takes all.
    notes: further statements for protocol.json. The rest as the flags of run.py.
    """

    model: str
    datasets: list[str]
    strategies: list[str]
    folder: Path
    attn_config: Callable[[int], dict[str, Any]]
    device: str
    dtype: str
    lora: str | None = None
    extended: bool = False
    data_path: str | None = None
    skip_bad: bool = False
    num_examples: int | None = None
    seed: int | None = None
    protocol: str = "official"
    max_length: int | None = None
    batch_size: int = 1
    diagnose: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> str:
        """How the samples were chosen, as the protocol states it."""
        if self.num_examples is None:
            return "all of each dataset"
        return f"{self.num_examples} of each dataset at most, " + (
            "the first" if self.seed is None else f"drawn at random with seed {self.seed}"
        )


def run_job(job: Job) -> dict[str, list[dict[str, Any]]]:
    """Reads the data, loads the model, generates what is missing in job.folder (see benchmark.runner) and returns
    LongBench's records that the samples were made of, by dataset.

    Everything that can be wrong with names, data, packages and configuration is said before the model is loaded; a
    prompt that does not fit the model's window before the first token is generated. Raises ValueError and its kin,
    FileNotFoundError, ModuleNotFoundError.
    """
    if job.protocol not in PROTOCOLS:
        raise ValueError(f"protocol: got {job.protocol!r}, allowed: {', '.join(PROTOCOLS)}")
    if job.num_examples is not None and job.num_examples < 1:
        raise ValueError(f"num_examples: got {job.num_examples}, allowed: an integer >= 1")
    strategies = resolve_strategies(job.strategies, job.attn_config(_CHECKED_LENGTH))
    require_packages(METRIC[dataset] for dataset in job.datasets)
    sources, left_out = read_sources(job)
    tokenizer = load_tokenizer(job.model)
    llm = load_model(job.model, None, job.dtype, job.device, tokenizer, lora=job.lora)
    protocol = make_protocol(job.protocol, tokenizer, job.model, llm.eos_ids, llm.max_length, job.max_length)
    tasks = [make_task(dataset, records, tokenizer, protocol) for dataset, records in sources.items()]
    check_room(tasks, tokenizer, llm.max_length)
    stated = {
        "benchmark": "LongBench-E" if job.extended else "LongBench",
        "model": job.model,
        "lora": job.lora,
        "dtype": job.dtype,
        "samples": job.samples,
        **protocol.describe(tokenizer),
        **job.notes,
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    run_tasks(
        llm,
        tokenizer,
        tasks,
        strategies,
        job.attn_config(llm.max_length),
        job.folder,
        stated,
        batch_size=job.batch_size,
        diagnose=job.diagnose,
    )
    with locked(job.folder):
        _keep_left_out(job.folder, left_out)
    return sources


def resolve_strategies(names: Sequence[str], attn_config: dict[str, Any]) -> list[str]:
    """Strategies of names, variants as with_estimation reads them, or attention types, once each. ConfigError for an
    unknown one lists the known."""
    settings = RetroInferConfig(**attn_config["RetroInfer"])
    if not names:
        raise ValueError("strategies: got none, allowed: at least one")
    resolved = [resolve_strategy(name, settings) if name in ATTENTION_TYPES else name for name in names]
    for name in resolved:
        with_estimation(name, settings)
    return list(dict.fromkeys(resolved))


def read_sources(job: Job) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[Skipped]]]:
    """The job's records and the lines left out of their files, by dataset; the latter are told on stderr too."""
    sources, left_out = {}, {}
    for dataset in job.datasets:
        records, left_out[dataset] = read_dataset(job.data_path, dataset, job.extended, job.skip_bad)
        for line in left_out[dataset]:
            print(f"{dataset}, line {line.number} left out: {line.problem}", file=sys.stderr)
        sources[dataset] = _chosen(records, job.num_examples, job.seed)
    return sources, left_out


def finished_records(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The complete records in a runner's folder by strategy, full attention first, and dataset."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    strategies = (path.name for path in folder.iterdir() if path.is_dir() and path.name != "parts")
    for strategy in sorted(strategies, key=lambda name: (name != "full", name)):
        by_dataset = {dataset: read_records(folder, strategy, dataset) for dataset in DATASETS}
        found[strategy] = {dataset: records for dataset, records in by_dataset.items() if records}
    return {strategy: by_dataset for strategy, by_dataset in found.items() if by_dataset}


def lines_left_out(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What --skip_bad left out of the datasets whose records are in a runner's folder: {"number", "problem"} a line."""
    path = folder / LEFT_OUT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _keep_left_out(folder: Path, left_out: Mapping[str, Sequence[Skipped]]) -> None:
    fresh = {dataset: [asdict(line) for line in lines] for dataset, lines in left_out.items()}
    told = {dataset: lines for dataset, lines in {**lines_left_out(folder), **fresh}.items() if lines}
    if told or (folder / LEFT_OUT).exists():
        write_json(folder / LEFT_OUT, told)


def _chosen(records: list[dict[str, Any]], count: int | None, seed: int | None) -> list[dict[str, Any]]:
    if count is None or count >= len(records):
        return records
    return records[:count] if seed is None else Random(seed).sample(records, count)
