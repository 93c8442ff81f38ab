"""Times one decode token by stage: python -m benchmark.decode.latency --traces FOLDER.. --output FILE.json

Every strategy's own cache is filled with attention states of the wanted shape, put together out of recorded ones as
`extended` says, and decodes the steps recorded behind them. Some layers, evenly spaced, are built and timed and stand
for all: a token takes their mean times the number of layers. --dense puts projections and MLP with random weights of
the true shape between the attentions, and adds the output projection, as CUDA graphs where the strategy can; a layer
then takes its share of what the step takes without that projection, so that what a step does beside its layers counts
too often rather than too seldom. Its layers predict the queries that the model recorded predicted, and none where a
timed layer but the first lacks them ("predicted" in a row): leave layer 0, which has none, out of --trace_layers.
Prefill is not done, so not counted.

Beside each time stands its roofline: bytes of keys, values and clusters attended to, where they lie, over the bandwidth
of plain copies measured in the same run, and with --dense the weights' too; what a search reads is not in it. Stages
are CacheStats.seconds: beside a GPU, what the CPU waited for. fill_seconds_per_layer is all that storing and building
take; build_seconds_per_layer names its stages, of which "build" is the sum of the index's. Recall comes from steps that
are not timed. Rows are written as they are finished; a call with the same settings goes on behind. Exit status 2: bad
input, or a row that did not fit the GPU's memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from cache_hub import AUTO
from cache_hub.retroinfer_cache import WaveIndexCache
from config import ConfigError, FlatConfig, RetroInferConfig, add_config_args, config_from_args
from model_hub.loading import DTYPES

from ..command import exit_status
from ..index.layers import parse_layers
from ..index.results import ResultsFile
from ..index.traces import open_folder
from ..launcher import default_device
from ..results import environment
from ..shared_builds import Variant, shared_builds
from .bandwidth import copy_bandwidths, synchronize
from .dense import DenseModel, DenseSizes
from .extended import ExtendedTraces, Shape
from .latency_row import costs, of_token, remarks, table
from .steps import PROFILED, Prompts, compare, fill, play, profile

# Behind the name of a flat variant: flat.on_gpu, and behind that, if anything, flat.scan_share.
ON_GPU = "@gpu"
STRATEGIES = "full,wave_index,attention_aware_graph+none,attention_aware_graph+centroid,flat+none"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.decode.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--traces", nargs="+", type=Path, required=True, help="folders of benchmark.index.extract; the order counts")
    add("--trace_layers", help="such as 6,13,20-22; default: all that the traces have in common")
    add("--model_name", default="Llama-3.1-8B-Instruct", help="whose configuration is taken")
    add("--shape", default="32,32,8,128", help="layers,heads,kv_heads,head_dim (default: Llama-3.1-8B's)")
    add("--layers", type=int, default=4, help="that are built and timed, and stand for all (default: 4)")
    add("--context_len", default="32768", help="comma list of prompts' tokens (default: 32768)")
    add("--batch", default="1", help="comma list of batch sizes (default: 1)")
    add("--prefill_bsz", type=int, default=1, help="prompts that share an index and its searches (default: 1)")
    scans = "flat+centroid@gpu scans there, flat+centroid@gpu0.05 with that flat.scan_share"
    add("--strategies", default=STRATEGIES, help=f"comma list; {scans} (default: {STRATEGIES})")
    add("--steps", type=int, default=32, help="decode steps timed (default: 32)")
    add("--warmup", type=int, default=4, help="decode steps before these (default: 4)")
    add("--recall_steps", type=int, default=4, help="steps compared with the exact scan, untimed; 0: none (default: 4)")
    add("--dense", action="store_true", help="projections and MLP between the attentions, random weights")
    add("--hidden", type=int, default=4096, help="model width, for --dense (default: 4096)")
    add("--mlp", type=int, default=14336, help="width of the MLP, for --dense (default: 14336)")
    add("--vocab", type=int, default=128256, help="rows of the output projection, for --dense (default: 128256)")
    add("--device", default=default_device(), help="cpu or cuda:N")
    add("--dtype", default="bf16" if gpu else "fp32", choices=sorted(DTYPES), help="of states and weights")
    add("--profile", type=Path, help="folder for traces and tables of torch.profiler over some steps of every row")
    add("--output", type=Path, required=True, help="JSON file of the rows")
    add_config_args(parser)
    return parser.parse_args(argv)


class Latency:
    """Goes through contexts, batches and strategies; `run` has checked the flags.

    missing: what did not fit the GPU's memory.
    """

    def __init__(self, args: argparse.Namespace, extended: ExtendedTraces, output: ResultsFile) -> None:
        self.args, self.extended, self.output = args, extended, output
        self.layers = [at * extended.shape.layers // args.layers for at in range(args.layers)]
        self.dtype: torch.dtype = DTYPES[args.dtype]
        self.where, self.bandwidths = environment(), copy_bandwidths(args.device)
        self.dense: DenseModel | None = None
        self.missing: list[str] = []

    def at(self, batch: int, length: int, builds: Sequence[Sequence[Variant]]) -> None:
        """Every variant that `output` has no row of, with one build for those that can share it."""
        args, extended = self.args, self.extended
        together = min(args.prefill_bsz, batch)
        prompts = Prompts(extended, self.layers, batch, length, together, args.device, self.dtype)
        for build in builds:
            missing = [one for one in build if row_key(one, batch, length) not in self.output]
            try:
                for row in self._rows(missing, prompts) if missing else ():
                    self.output.add(row)
                    print(table([row], head=len(self.output.rows) == 1), file=sys.stderr, flush=True)
            except torch.OutOfMemoryError as error:
                self.missing.append(f"{missing[0].name}, {length} tokens, batch {batch}: {error}")
            torch.cuda.empty_cache()

    def _rows(self, build: Sequence[Variant], prompts: Prompts) -> Iterator[dict[str, Any]]:
        args, every = self.args, range(self.args.warmup + self.args.steps)
        warmup, timed = every[: args.warmup], every[args.warmup :]
        if args.dense and (self.dense is None or len(self.dense.tokens) != prompts.batch):
            self.dense = None  # frees the weights before others are made
            sizes = DenseSizes(args.hidden, args.mlp, args.vocab)
            self.dense = DenseModel(
                prompts.extended.shape, sizes, len(self.layers), prompts.batch, args.device, self.dtype
            )
            self.dense.measure(args.warmup, args.steps)
        # Clusters are added to a filled cache, but not taken away.
        build = sorted(build, key=lambda one: one.settings.attention_aware_graph.estimation == "centroid")
        first = build[0]
        cache, steps, seconds = fill(first.strategy, first.settings, prompts, room(args))
        for variant in build:
            if variant is not first:
                cache.rewind()
                begin = perf_counter()
                cache.retune(variant.settings)
                synchronize(args.device)
                seconds += perf_counter() - begin
            built = {stage: spent / len(self.layers) for stage, spent in cache.stats.seconds.items()}
            play(cache, steps, warmup, args.device, self.dense)
            played = play(cache, steps, timed, args.device, self.dense)
            row = costs(cache, prompts, played, self.bandwidths, self.dense)
            row |= of_token(row, prompts, self.bandwidths, self.dense)
            if args.profile:
                name = f"{variant.name}_{prompts.length}_{prompts.batch}".replace("+", "_")
                profile(args.profile / name, cache, steps, timed[:PROFILED], args.device, self.dense)
            if args.recall_steps:
                play(cache, steps, warmup, args.device, self.dense)
                row |= compare(cache, steps, timed[: args.recall_steps], args.device, self.dense)
            yield {
                "key": row_key(variant, prompts.batch, prompts.length),
                "name": variant.name,
                "strategy": variant.strategy,
                "context_len": prompts.length,
                "batch": prompts.batch,
                **row,
                "build_seconds_per_layer": built,
                "fill_seconds_per_layer": seconds / len(self.layers),
                "extended": self.extended.describe(prompts.length) | {"predicted": steps.predicted is not None},
                "copy_gb_per_s": self.bandwidths,
                "notes": remarks(cache, variant.strategy, row, args.device),
                "settings": variant.settings.model_dump(),
                "environment": self.where,
            }


def room(args: argparse.Namespace) -> int:
    """Tokens that are decoded behind one prompt before the cache is rewound, or freed."""
    untimed = (args.warmup + args.recall_steps if args.recall_steps else 0) + (PROFILED if args.profile else 0)
    return args.warmup + args.steps + untimed


def row_key(variant: Variant, batch: int, length: int) -> str:
    """What a row is a result of, beside the protocol."""
    made_of = [variant.name, variant.settings.model_dump(), batch, length]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def plan(args: argparse.Namespace, length: int) -> list[list[Variant]]:
    """The variants by build; no generated token enters an index. ConfigError for a bad name or setting."""
    settings = RetroInferConfig(**config_from_args(args, args.model_name, length)["RetroInfer"])
    graph = settings.attention_aware_graph.model_copy(update={"insert_batch": 0})
    update = {"attention_aware_graph": graph, "use_cuda_graph": args.dense}
    settings = settings.model_copy(update=update)
    names = args.strategies.split(",")
    if AUTO in {name.partition("+")[0] for name in names}:
        raise ConfigError(f"strategies: got {args.strategies!r}, allowed: what is compared, not {AUTO!r}")
    builds = shared_builds([name for name in names if ON_GPU not in name], settings)
    for suffix in dict.fromkeys(name[name.index(ON_GPU) :] for name in names if ON_GPU in name):
        flat = settings.flat.model_copy(update={"on_gpu": True} | _scan_share(suffix.removeprefix(ON_GPU)))
        there = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
        scans = shared_builds(there, settings.model_copy(update={"flat": flat}))
        builds += [[replace(one, name=one.name + suffix) for one in build] for build in scans]
    return builds


def _scan_share(text: str) -> dict[str, float]:
    """flat.scan_share, if any is given."""
    try:
        return {"scan_share": FlatConfig(scan_share=float(text)).scan_share} if text else {}
    except ValueError:
        raise ConfigError(f"strategies: got {ON_GPU}{text}, allowed: {ON_GPU}, {ON_GPU}0.05 and the like") from None


def check(args: argparse.Namespace) -> tuple[Shape, list[int], list[int]]:
    """Shape, contexts and batches; ValueError for a flag that is not allowed."""
    shape = Shape.parse(args.shape)
    for name, least in (("steps", 1), ("warmup", 0), ("recall_steps", 0), ("prefill_bsz", 1), ("layers", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"{name}: got {getattr(args, name)}, allowed: >= {least}")
    for name in ("hidden", "mlp", "vocab"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, allowed: >= 1")
    if args.recall_steps > args.steps:
        raise ValueError(f"recall_steps: got {args.recall_steps}, allowed: 0 to {args.steps} (steps)")
    if room(args) >= WaveIndexCache.update_tokens:
        raise ValueError(
            f"steps: got {args.steps}, which decodes {room(args)} tokens in all, allowed: fewer than "
            f"{WaveIndexCache.update_tokens} in all, behind which the wave index clusters anew"
        )
    args.layers = min(args.layers, shape.layers)
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if args.device not in devices:
        raise ValueError(f"device: got {args.device!r}, allowed here: {', '.join(devices)}")
    return shape, _numbers("context_len", args.context_len), _numbers("batch", args.batch)


def _numbers(name: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{name}: got {text!r}, allowed: a comma list of numbers >= 1")
    return list(dict.fromkeys(map(int, words)))


@torch.inference_mode()
def run(args: argparse.Namespace) -> str:
    """Checks everything, measures what `output` has no row of, and returns the table of all rows."""
    shape, lengths, batches = check(args)
    plans = {length: plan(args, length) for length in lengths}
    layers = None if args.trace_layers is None else parse_layers(args.trace_layers)
    folders = [open_folder(path, layers) for path in args.traces]
    if len({folder.digest for folder in folders}) < len(folders):
        raise ValueError("traces: the same trace is given twice, allowed: once, as a key and its copy score alike")
    extended = ExtendedTraces(folders, shape, args.warmup + args.steps)
    for length in lengths:
        extended.pieces(length)
    if torch.device(args.device).type == "cuda":
        torch.cuda.set_device(args.device)
    where = environment()
    names = ("shape", "layers", "prefill_bsz", "steps", "warmup", "recall_steps", "dense", "hidden", "mlp", "vocab")
    protocol = {name: getattr(args, name) for name in (*names, "device", "dtype")}
    protocol |= {"machine": {name: where[name] for name in ("cpu", "threads", "gpu")}}
    protocol |= {"traces": [[folder.name, folder.digest] for folder in folders], "trace_layers": extended.layers}
    output = ResultsFile(args.output, protocol)
    latency = Latency(args, extended, output)
    for length in lengths:
        for batch in batches:
            latency.at(batch, length, plans[length])
    if latency.missing:
        raise RuntimeError(f"out of GPU memory, no row: {'; '.join(latency.missing)}")
    return table(output.rows)


def main(argv: list[str] | None = None) -> int:
    return exit_status("benchmark.decode.latency", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
