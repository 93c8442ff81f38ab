"""LongBench for one model and any strategies; resumes where it stopped.

python -m benchmark.LongBench.run --model SmolLM2-135M-Instruct --data_path FOLDER --datasets qasper,trec

Files below --save_dir, with _e for LongBench-E:
    records[_e]/<model>/                          the runner's: records, timings, protocol, results.json
    pred[_e]/<model>/<strategy>/<dataset>.jsonl   predictions as THUDM/LongBench and RetroInfer write them
    pred[_e]/<model>/<strategy>/result.json       their scores
    pred[_e]/<model>/summary.json                 all strategies: scores, both averages, protocol, agreement with full
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from benchmark.command import exit_status
from benchmark.launcher import default_device
from benchmark.models import SHORT_NAMES, full_name
from benchmark.results import locked, write_json
from config import add_config_args, config_from_args

from .catalog import CATEGORY_OF_SHORT, choose_datasets
from .evaluation import Job, finished_records, run_job
from .layouts import write_upstream
from .protocols import PROTOCOLS
from .records import LAYOUT
from .summary import report, summarise


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(parser)
    parser.add_argument("--datasets", type=comma_list, default=[], help="names, comma-separated (default: all)")
    parser.add_argument(
        "--category", type=comma_list, default=[], help=f"of {', '.join(CATEGORY_OF_SHORT)}: add its datasets"
    )
    parser.add_argument("--e", action="store_true", help="LongBench-E: 13 datasets, scores by length")
    parser.add_argument("--data_path", help=LAYOUT)
    parser.add_argument("--skip_bad", action="store_true", help="leave malformed lines out instead of stopping")
    parser.add_argument("--num_examples", type=int, help="first samples of each dataset (default: all)")
    parser.add_argument("--protocol", default="official", choices=PROTOCOLS)
    parser.add_argument("--max_length", type=int, help="prompts above lose their middle (default: the protocol's)")
    parser.add_argument(
        "--strategies",
        type=comma_list,
        help="variants as flat+none and snapkv@512 or attention types too, comma-separated (default: full and "
        "--attn_type's)",
    )
    parser.add_argument("--save_dir", type=Path, default=Path("results/LongBench"))
    parser.add_argument("--batch_size", type=int, default=1, help="samples of equal length run together")
    parser.add_argument("--diagnose", action="store_true", help="recall and mass against an exact scan")
    add_config_args(parser)
    return parser.parse_args(argv)


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """--model, --lora, --device, --dtype."""
    gpu = torch.cuda.is_available()
    names = f"hub name, folder, .gguf file, {', '.join(SHORT_NAMES)}"
    parser.add_argument("--model", "--model_name", default="SmolLM2-135M-Instruct", help=names)
    parser.add_argument("--lora", help="PEFT LoRA folder to merge; 'none' keeps the default model without its adapter")
    parser.add_argument("--device", default=default_device(), help="cpu, cuda:N, or auto: all GPUs")
    parser.add_argument("--dtype", default="bf16" if gpu else "fp32", choices=["fp16", "bf16", "fp32"])


def comma_list(text: str) -> list[str]:
    """The names of a comma-separated list."""
    return [name for name in text.split(",") if name]


def run(args: argparse.Namespace) -> str:
    """Runs what the flags ask for, writes all files and returns the report."""
    model = full_name(args.model)
    label, suffix = Path(model).name, "_e" if args.e else ""
    job = Job(
        model=model,
        datasets=choose_datasets(args.datasets, args.category, args.e),
        strategies=args.strategies if args.strategies is not None else ["full", args.attn_type],
        folder=args.save_dir / f"records{suffix}" / label,
        attn_config=partial(config_from_args, args, model),
        device=args.device,
        dtype=args.dtype,
        lora=args.lora,
        extended=args.e,
        data_path=args.data_path,
        skip_bad=args.skip_bad,
        num_examples=args.num_examples,
        protocol=args.protocol,
        max_length=args.max_length,
        batch_size=args.batch_size,
        diagnose=args.diagnose,
    )
    run_job(job)
    predictions = args.save_dir / f"pred{suffix}" / label
    predictions.mkdir(parents=True, exist_ok=True)
    with locked(job.folder):
        for strategy, records in finished_records(job.folder).items():
            write_upstream(predictions / strategy, records, args.e)
        summary = summarise(job.folder, args.e)
        write_json(predictions / "summary.json", summary)
    return report(summary)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("LongBench", partial(run, args))


if __name__ == "__main__":
    sys.exit(main())
