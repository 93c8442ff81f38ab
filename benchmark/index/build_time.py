"""Times a prefill with and without the graph's build: python -m benchmark.index.build_time --traces DIR.. --output FILE

A model of the wanted shape with random weights reads a prompt: once with a cache for full attention, then with one of
attention_aware_graph, in turns, `rounds` times behind one that is not timed. Its layers compute all that a layer does,
but the queries, keys and values that attention and build get are recorded ones, put together out of traces as
benchmark.decode.extended says, since random ones make other lists. Some layers stand for all.

A row says what a layer takes, in ms, medians over the rounds: prefill, with full attention's cache; with_build; added,
the difference, which is what is not hidden; the stages of the build where they are done: query_key_knn, key_key_knn,
projection and cluster while the caller waits, and beside a GPU links_copy, keys_copy, repair and pack by another
thread; and as a share of prefill, all stages and what is added. peak_device_bytes: of the GPU's memory, the weights of
these layers and their recorded states included. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from cache_hub import KV_Cache
from config import RetroInferConfig, add_config_args, config_from_args
from model_hub.layers import DecoderLayer
from model_hub.llm import LLM
from model_hub.loading import DTYPES

from ..command import exit_status
from ..decode.bandwidth import synchronize
from ..decode.dense import DenseSizes, around, random_weights
from ..decode.extended import ExtendedTraces, Shape
from ..launcher import default_device
from ..results import environment
from .results import ResultsFile
from .traces import open_folder

STAGES = ("query_key_knn", "key_key_knn", "projection", "cluster", "links_copy", "keys_copy", "repair", "pack")


class RecordedPromptLayer(DecoderLayer):
    """A decoder layer that projects a prompt as one does, and whose attention then gets recorded states: query
    [1, L, H, D], key and value [1, L, Hkv, D]."""

    __slots__ = ("states",)
    states: tuple[Tensor, Tensor, Tensor]

    def project_prompt(self, hidden: Tensor, cos: Tensor, sin: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        super().project_prompt(hidden, cos, sin, chunk)
        return self.states


class Build:
    """The model, and prompts of recorded states for its layers; layer i gets those of layer i % distinct."""

    def __init__(self, args: argparse.Namespace, extended: ExtendedTraces) -> None:
        self.args, self.extended, self.dtype = args, extended, DTYPES[args.dtype]
        sizes = DenseSizes(args.hidden, args.mlp, args.vocab)
        weights = random_weights(extended.shape, sizes, args.layers, args.device, self.dtype)
        self.layers = [RecordedPromptLayer(*fields) for fields in weights]
        self.llm: LLM = around(self.layers, sizes)

    def show(self, length: int) -> None:
        """Puts prompts of `length` tokens before the layers."""
        for layer in self.layers:
            layer.states = (torch.empty(0), torch.empty(0), torch.empty(0))
        every = self.extended.shape.layers // self.args.layers
        for number, layer in enumerate(self.layers):
            if number < self.args.distinct:
                made = self.extended.states(number * every, 0, length, self.dtype)
                q, k, v = (states[None].to(self.args.device) for states in (made.queries, made.keys, made.values))
                layer.states = q, k, v
            else:
                layer.states = self.layers[number % self.args.distinct].states

    def prefill(self, strategy: str, settings: RetroInferConfig, length: int) -> tuple[float, KV_Cache]:
        """Seconds until a cache, made before, is ready to decode; and the cache."""
        cache = self.llm.init_cache(strategy, settings, [length], self.args.new)
        ids = torch.zeros(1, length, dtype=torch.int64, device=self.args.device)
        if ids.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.args.device)
        synchronize(self.args.device)
        begin = perf_counter()
        self.llm.prefill(ids, None, cache)
        synchronize(self.args.device)
        return perf_counter() - begin, cache

    def row(self, settings: RetroInferConfig, length: int) -> dict[str, Any]:
        """Of one context, see the module's description."""
        self.show(length)
        taken: dict[str, list[float]] = {"prefill": [], "with_build": []}
        stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
        peaks = {name: 0 for name in taken}
        for number in range(self.args.rounds + 1):
            for name, strategy in (("prefill", "full"), ("with_build", "attention_aware_graph")):
                seconds, cache = self.prefill(strategy, settings, length)
                if torch.device(self.args.device).type == "cuda":
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(self.args.device))
                if number:
                    taken[name].append(seconds)
                    for stage in STAGES if strategy != "full" else ():
                        stages[stage].append(cache.stats.seconds[stage])
                notes = cache.stats.notes
                del cache  # whose pinned memory is given back before the next is asked for
        layer_ms = 1e3 / len(self.layers)
        times = {name: layer_ms * median(seconds) for name, seconds in taken.items()}
        built = {stage: layer_ms * median(seconds) for stage, seconds in stages.items()}
        added = layer_ms * median(b - a for a, b in zip(taken["prefill"], taken["with_build"], strict=True))
        return {
            "context_len": length,
            "ms_per_layer": times | {"added": added},
            "stage_ms_per_layer": built,
            "build_of_prefill": sum(built.values()) / times["prefill"],
            "added_of_prefill": added / times["prefill"],
            "seconds": taken,
            "peak_device_bytes": peaks,
            "notes": notes,
            "extended": self.extended.describe(length),
        }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, ms of a layer."""
    names = ("prefill", "with_build", "added")
    head = ["tokens", *names, *STAGES, "build / prefill", "added / prefill"]
    lines = [f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
    for row in rows:
        times = [row["ms_per_layer"][name] for name in names] + [row["stage_ms_per_layer"][stage] for stage in STAGES]
        shares = [f"{row[name]:.2f}" for name in ("build_of_prefill", "added_of_prefill")]
        lines.append(f"| {' | '.join([str(row['context_len']), *(f'{ms:.1f}' for ms in times), *shares])} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index.build_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--traces", nargs="+", type=Path, required=True, help="folders of benchmark.index.extract; the order counts")
    add("--model_name", default="Llama-3.1-8B-Instruct", help="whose configuration is taken")
    add("--shape", default="32,32,8,128", help="layers,heads,kv_heads,head_dim (default: Llama-3.1-8B's)")
    add("--layers", type=int, default=8, help="that are computed, and stand for all (default: 8)")
    add("--distinct", type=int, default=4, help="of them with states of their own, which lie on the GPU (default: 4)")
    add("--lengths", default="32768,131072", help="comma list of tokens (default: 32768,131072)")
    add("--new", type=int, default=512, help="tokens that the caches have room for (default: 512)")
    add("--rounds", type=int, default=3, help="default: 3")
    add("--hidden", type=int, default=4096, help="model width (default: 4096)")
    add("--mlp", type=int, default=14336, help="width of the MLP (default: 14336)")
    add("--vocab", type=int, default=128256, help="rows of the output projection (default: 128256)")
    add("--device", default=default_device(), help="cpu or cuda:N")
    add("--dtype", default="bf16" if gpu else "fp32", choices=sorted(DTYPES), help="of states and weights")
    add("--output", type=Path, required=True, help="JSON file of the rows")
    add_config_args(parser)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> tuple[Shape, list[int]]:
    """Shape and lengths; ValueError for a flag that is not allowed."""
    shape = Shape.parse(args.shape)
    words = args.lengths.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"lengths: got {args.lengths!r}, allowed: a comma list of numbers >= 1")
    for name in ("layers", "distinct", "new", "rounds", "hidden", "mlp", "vocab"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, allowed: >= 1")
    args.layers = min(args.layers, shape.layers)
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if args.device not in devices:
        raise ValueError(f"device: got {args.device!r}, allowed here: {', '.join(devices)}")
    return shape, list(dict.fromkeys(map(int, words)))


@torch.inference_mode()
def run(args: argparse.Namespace) -> str:
    """Checks everything, measures what `output` has no row of, and returns the table of all rows."""
    shape, lengths = check(args)
    folders = [open_folder(path) for path in args.traces]
    extended = ExtendedTraces(folders, shape, 1)
    plans = {}
    for length in lengths:
        extended.pieces(length)
        plans[length] = RetroInferConfig(**config_from_args(args, args.model_name, length)["RetroInfer"])
    if torch.device(args.device).type == "cuda":
        torch.cuda.set_device(args.device)
    where = environment()
    names = ("shape", "layers", "distinct", "new", "rounds", "hidden", "mlp", "vocab", "device", "dtype")
    protocol = {name: getattr(args, name) for name in names}
    protocol |= {"machine": {name: where[name] for name in ("cpu", "threads", "gpu")}}
    protocol |= {"traces": [[folder.name, folder.digest] for folder in folders], "trace_layers": extended.layers}
    output = ResultsFile(args.output, protocol)
    build = None
    for length, settings in plans.items():
        made_of = json.dumps([settings.model_dump(), length], sort_keys=True)
        key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        if key in output:
            continue
        build = build or Build(args, extended)
        row = {"key": key, **build.row(settings, length), "settings": settings.model_dump(), "environment": where}
        output.add(row)
        print(table([row]), file=sys.stderr, flush=True)
    return table(output.rows)


def main(argv: list[str] | None = None) -> int:
    return exit_status("benchmark.index.build_time", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
