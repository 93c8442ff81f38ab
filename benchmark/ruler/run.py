"""RULER in one command: makes the data, runs a model through the strategies, scores.

python -m benchmark.ruler.run --model_name smollm2-135m --tasks free --context_len 4096 --strategies full,flat

<output>/<model>/synthetic/<length>/ gets data/<task>/validation.jsonl, the runner's records and results.json, and
<strategy>/pred/ with upstream's summary.csv and submission.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

from config import RetroInferConfig, config_from_args, resolve_strategy
from model_hub import load_model, load_tokenizer

from ..command import exit_status
from ..runner import Sample, Task, read_records, run_tasks
from .chat import ChatTemplate, chat_template
from .data_files import FILE, Rows, kept_rows, read_rows
from .essays import haystack_name
from .generator import Setting
from .options import parse_args
from .samples import make_rows
from .scoring import score_records, write_evaluation
from .sources import Sources
from .specs import TASKS, parse_tasks
from .tokens import adds_special_tokens, special_token_count, token_counter


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.ruler", partial(run, args))


def run(args: argparse.Namespace) -> None:
    """All lengths: first the data of all, which fails early, then the model."""
    names = parse_tasks(args.tasks)
    configs = {length: config_from_args(args, args.model_name, length) for length in args.context_len}
    settings = RetroInferConfig(**configs[args.context_len[0]]["RetroInfer"])
    strategies = args.strategies or [resolve_strategy(args.attn_type, settings)]
    tokenizer = load_tokenizer(args.model_name)
    chat = chat_template(args.template, tokenizer)
    sources = Sources(args.essay_path, args.qa_path, args.any_wordlist, args.skip_bad)
    protocols = {length: run_protocol(args, length, chat, sources) for length in args.context_len}
    data = {length: task_data(args, names, length, tokenizer, chat, sources) for length in args.context_len}
    if args.data_only:
        return
    longest = max(args.context_len)
    if args.data_path:
        longest = max(longest, _longest(data, tokenizer))
    llm = load_model(args.model_name, longest, args.dtype, args.device, tokenizer, args.lora)
    stop_ids = frozenset() if args.ignore_eos else frozenset(llm.eos_ids)
    for length, rows_of in data.items():
        folder = result_folder(args, length)
        tasks = [make_task(name, rows, tokenizer, stop_ids) for name, rows in rows_of.items()]
        run_tasks(
            llm,
            tokenizer,
            tasks,
            strategies,
            configs[length],
            folder,
            {**protocols[length], "stop_ids": sorted(stop_ids)},
            batch_size=args.batch_size,
            diagnose=args.diagnose,
        )
        for strategy in strategies:
            # A process of several may end before the others' samples are there.
            if all(read_records(folder, strategy, name) for name in names):
                print(_told(length, strategy, write_evaluation(folder, strategy) or {}))


def result_folder(args: argparse.Namespace, length: int) -> Path:
    """<output>/<model>/synthetic/<length>"""
    return args.output / Path(args.model_name).name / "synthetic" / str(length)


def task_data(
    args: argparse.Namespace, names: list[str], length: int, tokenizer: Any, chat: ChatTemplate, sources: Sources
) -> dict[str, Rows]:
    """Rows of every task at a length: read from --data_path, or made and kept.

    Raises ValueError for a length below a task's minimum, and as kept_rows, read_rows and the loaders of Sources.
    """
    if args.data_path:
        return {name: read_rows(args.data_path / name / FILE, args.skip_bad)[: args.num_samples] for name in names}
    made_of = {name: sources.describe(TASKS[name]) for name in names}
    count = token_counter(tokenizer)
    special_tokens = special_token_count(tokenizer) if adds_special_tokens(tokenizer, chat.text) else 0
    rows_of = {}
    for name in names:
        setting = Setting(TASKS[name], chat, length, count, sources, args.seed, args.sizing, special_tokens)
        protocol = {
            "benchmark": "RULER",
            "task": name,
            "tokenizer": f"{Path(args.model_name).name}, {len(tokenizer)} tokens",
            **_sample_protocol(args, length, chat),
            "made_of": made_of[name],
        }
        rows_of[name] = kept_rows(
            result_folder(args, length) / "data" / name,
            protocol,
            lambda setting=setting: make_rows(setting, args.num_samples),  # type: ignore[misc]
            args.fields,
            args.skip_bad,
        )
    return rows_of


def make_task(name: str, rows: Rows, tokenizer: Any, stop_ids: frozenset[int]) -> Task:
    """A task for the runner. A sample's id holds a digest of its prompt, so that no record is taken for another's."""
    samples = []
    for row in rows:
        prompt = row["input"] + row["answer_prefix"]
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        samples.append(
            Sample(
                id=f"{row['index']}-{digest}",
                prompt=prompt,
                expected=row["outputs"],
                max_new_tokens=TASKS[name].new_tokens,
                special_tokens=adds_special_tokens(tokenizer, prompt),
                stop_ids=stop_ids,
                extra={"index": row["index"], "length": row.get("length", -1)},
            )
        )
    return Task(name, samples, lambda records: score_records(name, records))


def run_protocol(args: argparse.Namespace, length: int, chat: ChatTemplate, sources: Sources) -> dict[str, Any]:
    """What scores depend on beside stop tokens and the strategies' configuration; runs of other tasks share it."""
    made = {
        **_sample_protocol(args, length, chat),
        "haystack": haystack_name(args.essay_path),
        "words": sources.words_name,
    }
    return {
        "benchmark": "RULER",
        "model": args.model_name,
        "lora": args.lora,
        "dtype": args.dtype,
        "prefill_method": args.prefill_method,
        "samples": args.num_samples,
        "data": args.data_path.name if args.data_path else "generated",
        **({"length": length} if args.data_path else made),
    }


def _sample_protocol(args: argparse.Namespace, length: int, chat: ChatTemplate) -> dict[str, Any]:
    return {
        "length": length,
        "samples": args.num_samples,
        "seed": args.seed,
        "sizing": args.sizing,
        "template": chat.name,
        "template_text": chat.text,
    }


def _longest(data: dict[int, dict[str, Rows]], tokenizer: Any) -> int:
    count, special_tokens = token_counter(tokenizer), special_token_count(tokenizer)
    return special_tokens + max(
        count(row["input"] + row["answer_prefix"]) + TASKS[name].new_tokens
        for rows_of in data.values()
        for name, rows in rows_of.items()
        for row in rows
    )


def _told(length: int, strategy: str, scores: dict[str, float]) -> str:
    mean = sum(scores.values()) / len(scores)
    each = ", ".join(f"{task} {score}" for task, score in scores.items())
    return f"{length} {strategy}: mean of {len(scores)} tasks {mean:.2f} ({each})"


if __name__ == "__main__":
    sys.exit(main())
