"""Attention beside what eviction makes of it: python -m benchmark.plots.attention --trace FOLDER --output PLOT.png

For chosen query heads of a layer: the causal attention of the prompt, summed over cells of keys, in the mean over those
of queries, logarithmic; below it, for each method, the scores that it gives the tokens (of the head's kv head, as
ranks) with a line for those it keeps under a budget, and what the queries of the generated tokens attend to. Exit
status 2: bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_hub.eviction.attention import causal_rows
from cache_hub.eviction.importance import gaussian_smooth_ranks, select_top_k_tokens

from ..command import exit_status
from ..eviction import budgets_of, prompt_states, scorer_of, settings_of, test_weights
from ..index.traces import LayerTrace, open_folder
from ..results import check_writable

_FLOOR = 1e-6  # of a cell's attention, white


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.plots.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, help="folder of benchmark.index.extract")
    add("--layer", type=int, help="default: the trace's first")
    add("--heads", default="0", help="comma list of query heads (default: 0)")
    add("--strategies", default="snapkv,circuitkv+query", help="comma list (default: snapkv,circuitkv+query)")
    add("--budget", default="512", help="tokens kept (default: 512)")
    add("--cells", type=int, default=256, help="at most so many to a side (default: 256)")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of eviction or circuitkv")
    add("--output", type=Path, required=True, help="PNG file")
    return parser.parse_args(argv)


def attention_cells(query: Tensor, key: Tensor, cells: int) -> NDArray[np.float64]:
    """[c, c], c <= cells: attention of query [n, D] to key [n, D], summed over the keys of a cell, in the mean over its
    queries."""
    tokens = len(key)
    size = -(-tokens // cells)
    count = -(-tokens // size)
    of_key = torch.arange(tokens) // size
    made = torch.zeros(count, count, dtype=torch.float64)
    for cell in range(count):
        start, stop = cell * size, min((cell + 1) * size, tokens)
        rows = causal_rows(query[None, :, None], key[None, :, None], start, stop)[0, 0, 0]
        made[cell].index_add_(0, of_key[:stop], rows.mean(0).double())
    return made.numpy()


def draw(trace: LayerTrace, heads: list[int], methods: dict[str, tuple[Tensor, Tensor]], cells: int) -> bytes:
    """The drawing as PNG. methods: scores [Hkv, n] and kept tokens [Hkv, C] by name."""
    from matplotlib.colors import LogNorm

    from ..report.plots import new_figure, to_png  # imports matplotlib

    tokens, group = trace.keys.shape[1], trace.queries.shape[1]
    figure = new_figure((6.5 * len(heads), 7 + 1.4 * (len(methods) + 1)))
    ratios = [5, *[1] * (len(methods) + 1)]
    grid = figure.subplots(len(ratios), len(heads), squeeze=False, sharex=True, height_ratios=ratios)
    weights = test_weights(trace)
    for column, head in enumerate(heads):
        kv_head, member = divmod(head, group)
        axes = grid[:, column]
        made = attention_cells(trace.queries[kv_head, member].float(), trace.keys[kv_head].float(), cells)
        axes[0].imshow(
            np.maximum(made, _FLOOR),
            norm=LogNorm(_FLOOR, 1),
            cmap="Blues",
            aspect="auto",
            extent=(0, tokens, tokens, 0),
        )
        axes[0].set_title(f"layer {trace.layer}, query head {head} (kv head {kv_head})", fontsize=9)
        for row, (name, (scores, kept)) in zip(axes[1:], methods.items(), strict=False):
            row.plot(gaussian_smooth_ranks(scores[kv_head], 1, 1.0), linewidth=0.3, color="#0072b2")
            row.vlines(kept[kv_head], -0.25, -0.05, linewidth=0.3, color="#d55e00")
            row.set_ylabel(name, fontsize=6)
        axes[-1].semilogy(weights[kv_head, member].mean(0).clamp(min=1e-9), linewidth=0.3, color="#000000")
        axes[-1].set_ylabel("asked for later", fontsize=6)
        axes[-1].set_xlabel("token", fontsize=8)
        for axis in axes:
            axis.tick_params(labelsize=6)
    figure.tight_layout()
    return to_png(figure)


def run(args: argparse.Namespace) -> None:
    """Reads, checks, draws and writes; ModuleNotFoundError without matplotlib, ValueError for bad flags."""
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError('the plot needs matplotlib: python -m pip install -e ".[benchmark]"')
    check_writable(args.output)
    (budget,), settings = budgets_of(args.budget)[:1], settings_of(args.set)
    scorers = {name: scorer_of(name, settings, budget) for name in args.strategies.split(",")}
    folder = open_folder(args.trace)
    layer = next(iter(folder.files)) if args.layer is None else args.layer
    if layer not in folder.files:
        raise ValueError(f"layer: got {layer}, allowed: {', '.join(map(str, folder.files))}")
    trace = folder.load(layer)
    heads, there = [int(word) for word in args.heads.split(",")], trace.queries.shape[0] * trace.queries.shape[1]
    if not all(0 <= head < there for head in heads):
        raise ValueError(f"heads: got {args.heads!r}, allowed: 0 to {there - 1}")
    if not 0 < budget < folder.tokens or args.cells < 1:
        raise ValueError(f"budget, cells: got {budget}, {args.cells}, allowed: 1 to {folder.tokens - 1}, 1 or more")
    methods = {}
    for name, scorer in scorers.items():
        scores = scorer.score(*prompt_states(trace))
        methods[name] = scores[0], select_top_k_tokens(scores, budget, scorer.sinks, scorer.window)[0]
    part = args.output.with_name(f"{args.output.name}.part")
    part.write_bytes(draw(trace, heads, methods, args.cells))
    os.replace(part, args.output)


def main(argv: list[str] | None = None) -> int:
    return exit_status("benchmark.plots.attention", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
