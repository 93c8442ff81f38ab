"""LongBench called as KVCache-Factory's runner is, with results where its scripts look for them.

python benchmark/LongBench/run_longbench.py --model_path MODEL --method flat --max_capacity_prompts 1024

Files in <save_dir>/<model>_<budget>: <dataset>/<method>.json as KVCache-Factory's, run_meta.json, summary.json (scores,
both averages, protocol, agreement with FullKV where that ran too), records/ (the runner's; a run resumes from them).
The prompt protocol is LongBench's own; --protocol kvcache-factory takes theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: this folder's modules must not hide others, and the repository be found
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmark.command import exit_status
from benchmark.launcher import default_device
from benchmark.LongBench.catalog import ENGLISH_AND_CODE, choose_datasets
from benchmark.LongBench.evaluation import Job, finished_records, run_job
from benchmark.LongBench.layouts import write_kvcache_factory
from benchmark.LongBench.methods import (
    DEFAULT_CAPACITY,
    KVCACHE_FACTORY_METHODS,
    capacity_of,
    describe_budget,
    eviction_of_budget,
    strategy_of,
    top_k_of_budget,
)
from benchmark.LongBench.protocols import PROTOCOLS
from benchmark.LongBench.records import LAYOUT
from benchmark.LongBench.run import comma_list
from benchmark.LongBench.summary import report, summarise
from benchmark.models import full_name
from benchmark.results import environment, locked, write_json
from config import EVICTING, RETRIEVAL_STRATEGIES, RetroInferConfig, add_config_args, config_from_args
from config.config import override_key

DATA_FOLDER = Path("data/LongBench")
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (
        f"{', '.join(RETRIEVAL_STRATEGIES)}; of KVCache-Factory's {', '.join(KVCACHE_FACTORY_METHODS)} those that exist"
    )
    parser.add_argument("--method", required=True, help=known)
    parser.add_argument("--model_path", "--model", required=True, help="hub name, folder or .gguf file")
    parser.add_argument("--lora", help="PEFT LoRA folder to merge; 'none' keeps the default model without its adapter")
    parser.add_argument("--datasets", "--dataset", type=comma_list, default=list(ENGLISH_AND_CODE), help="default: 16")
    parser.add_argument("--data_path", help=f"{LAYOUT}; or in {DATA_FOLDER}, where KVCache-Factory looks")
    parser.add_argument("--skip_bad", action="store_true", help="leave malformed lines out instead of stopping")
    parser.add_argument(
        "--max_capacity_prompts",
        "--budget",
        type=int,
        help="tokens per query head, of what evicts per kv head, sinks and window included (default: "
        f"{DEFAULT_CAPACITY}; -1: the ratio holds; wave_index has none)",
    )
    parser.add_argument(
        "--max_capacity_prompts_ratio",
        type=float,
        default=-1,
        help="share of each prompt instead, for what evicts; FullKV ignores it",
    )
    parser.add_argument("--save_dir", type=Path, default=Path("results"))
    parser.add_argument("--eval_batch_size", type=int, default=1, help="must be 1")
    parser.add_argument("--max_num_examples", type=int, help="samples of each dataset (default: all)")
    parser.add_argument("--sample_method", default="topk", choices=["topk", "random"], help="the first, or by --seed")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--protocol", default="official", choices=PROTOCOLS)
    parser.add_argument("--max_length", type=int, help="prompts above lose their middle (default: the protocol's)")
    parser.add_argument("--device", default=default_device(), help="cpu, cuda:N, or auto: all GPUs")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32", choices=DTYPES)
    parser.add_argument(
        "--attn_implementation",
        choices=["flash_attention_2", "sdpa", "eager"],
        help="no effect: what is installed is used",
    )
    parser.add_argument(
        "--use_cache", default="True", choices=["True", "true"], help="no effect: there is always a cache"
    )
    add_config_args(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Runs what the flags ask for, writes all files and returns the report."""
    if args.eval_batch_size != 1:
        raise ValueError(f"eval_batch_size: got {args.eval_batch_size}, allowed: 1")
    model, strategy = full_name(args.model_path), strategy_of(args.method)
    capacity = capacity_of(strategy, args.max_capacity_prompts, args.max_capacity_prompts_ratio)
    args.max_capacity_prompts = capacity
    if args.top_k is not None:
        if strategy in ("wave_index", *EVICTING):
            raise ValueError(f"top_k: got {args.top_k}, allowed: not given: {strategy} has none")
        raise ValueError(f"top_k: got {args.top_k}, but max_capacity_prompts {capacity} sets it; allowed: one of them")
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings = RetroInferConfig(**config_from_args(args, model, 1 << 17)["RetroInfer"])
    key, own = settings.top_k_of(strategy)
    if key != "attention_aware_graph.top_k":
        raise ValueError(f"{key}: got {own}, but max_capacity_prompts {capacity} sets it; allowed: 0")
    args.top_k = top_k_of_budget(strategy, capacity, args.max_capacity_prompts_ratio, settings)
    kept = eviction_of_budget(strategy, capacity, args.max_capacity_prompts_ratio)
    for key, value in args.set or ():
        if override_key(key) in kept:
            flag = "max_capacity_prompts_ratio" if capacity == -1 else "max_capacity_prompts"
            raise ValueError(f"{key}: got {value!r}, but {flag} sets it; allowed: one of them")
    args.set = [*(args.set or ()), *kept.items()]
    settings = RetroInferConfig(**config_from_args(args, model, 1 << 17)["RetroInfer"])
    budget = args.max_capacity_prompts_ratio if "eviction.budget_share" in kept and capacity == -1 else capacity
    folder = args.save_dir / f"{Path(model).name.lower()}_{budget}"
    job = Job(
        model=model,
        datasets=choose_datasets(args.datasets),
        strategies=[strategy],
        folder=folder / "records",
        attn_config=partial(config_from_args, args, model),
        device=args.device,
        dtype=DTYPES[args.dtype],
        lora=args.lora,
        data_path=args.data_path or (str(DATA_FOLDER) if DATA_FOLDER.is_dir() else None),
        skip_bad=args.skip_bad,
        num_examples=args.max_num_examples,
        seed=args.seed if args.sample_method == "random" else None,
        protocol=args.protocol,
        max_length=args.max_length,
        notes={"budget": describe_budget(capacity, args.top_k, settings)},
    )
    sources = run_job(job)
    with locked(job.folder):
        finished = finished_records(job.folder).get(strategy, {})
        write_kvcache_factory(
            folder, args.method, {name: finished[name] for name in job.datasets if name in finished}, sources
        )
        summary = summarise(job.folder)
        write_json(folder / "summary.json", summary)
        _write_meta(folder / "run_meta.json", args.method, arguments, summary["config"])
    return report(summary)


def _write_meta(path: Path, method: str, arguments: dict[str, Any], protocol: dict[str, Any]) -> None:
    """Adds the method's run to run_meta.json: {method: {commit, arguments, versions, time, protocol}}."""
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    versions = environment()
    runs[method] = {
        "commit": versions.pop("commit"),
        "arguments": arguments,
        "versions": versions,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "protocol": protocol,
    }
    write_json(path, runs)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("run_longbench.py", partial(run, args))


if __name__ == "__main__":
    sys.exit(main())
