"""Attention states of any shape and length, out of traces of a smaller model: real ones, put together anew.

Longer: prompts one after another, those behind the first without their sinks, as in benchmark.index.joined. The last
one asks: the decode steps are the queries recorded behind it, and where more steps are wanted than that, its last
positions are held out and come before them. What is too long is cut out behind the first prompt's sinks.
Wider heads: kv heads h, h + 1, .. of one layer, round the end, side by side, and their query heads likewise; an inner
product is the sum of theirs. More kv heads: those of the next layers. More query heads in a group: the same ones, the
second time with those of the neighbouring kv head shifted by one, so that a wide query is another; a head that is not
widened repeats. Predicted queries are put together as the queries they predict. Layer i starts at the traces' i-th
layer, round the end; sequence b of a batch at the (i + b)-th.
No model computed such a prompt: good for times, the number of keys scored and recall, not for outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..index.exact_head import SINKS
from ..index.traces import LayerTrace, TraceFolder


@dataclass(frozen=True)
class Shape:
    """Of a decoder's attention: layers, query heads and kv heads of a layer, dimensions of a head."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """ "32,32,8,128"; ValueError for anything else than four positive numbers whose heads fit."""
        words = text.split(",")
        if len(words) != 4 or not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            raise ValueError(f"shape: got {text!r}, allowed: layers,heads,kv_heads,head_dim, such as 32,32,8,128")
        shape = cls(*map(int, words))
        if shape.heads % shape.kv_heads:
            raise ValueError(f"shape: got {shape.heads} heads, allowed: a multiple of the {shape.kv_heads} kv heads")
        return shape

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class States:
    """One layer of one sequence, on the CPU: the prompt's queries [L, H, D], keys and values [L, Hkv, D], and those of
    the decode steps behind it, [T, H, D] and [T, Hkv, D]. The keys and values of steps whose own no trace holds are
    those of the prompt's last tokens. step_predicted [T, H, D]: the predictions of the steps' queries, None where one
    of the traces' layers that this one is made of has none, or not of all steps."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    step_queries: Tensor
    step_keys: Tensor
    step_values: Tensor
    step_predicted: Tensor | None = None


class ExtendedTraces:
    """The traces of `folders`, in order, as prompts of another shape with `steps` decode steps behind them.

    Takes the layers that all folders have. tokens: the longest prompt there is. Raises ValueError for traces that have
    none in common or differ in kv heads, group or head dimension, a head dimension that theirs does not divide or that
    takes more kv heads than a layer has, and steps that leave no prompt.
    """

    def __init__(self, folders: Sequence[TraceFolder], shape: Shape, steps: int) -> None:
        common = set.intersection(*(set(folder.files) for folder in folders))
        if not common:
            told = "; ".join(f"{folder.name}: {', '.join(map(str, folder.files))}" for folder in folders)
            raise ValueError(f"traces: no layer is in all of them ({told}), allowed: one or more in common")
        self.folders, self.shape, self.steps, self.layers = list(folders), shape, steps, sorted(common)
        firsts = [folder.load(self.layers[0]) for folder in folders]
        sizes = {(*trace.queries.shape[:2], trace.queries.shape[3]) for trace in firsts}
        if len(sizes) > 1:
            raise ValueError(f"traces: got [kv heads, g, d] of {sorted(sizes)}, allowed: the same for all")
        ((self.kv_heads, self.group, self.head_dim),) = sizes
        self.width = shape.head_dim // self.head_dim
        if shape.head_dim % self.head_dim or self.width > self.kv_heads:
            wide = [self.head_dim * count for count in range(1, self.kv_heads + 1)]
            raise ValueError(f"head_dim: got {shape.head_dim}, allowed for these traces: {', '.join(map(str, wide))}")
        self._held = [max(steps - trace.tests.shape[2], 0) for trace in firsts]
        for folder, held in zip(self.folders, self._held, strict=True):
            if folder.tokens - held <= SINKS:
                raise ValueError(
                    f"steps: got {steps}, of which {held} positions of {folder.path} are held out, allowed: fewer than "
                    f"its {folder.tokens} tokens less {SINKS}"
                )
        self.tokens = max(self._tokens(count) for count in range(1, len(folders) + 1))

    def _tokens(self, count: int) -> int:
        """Of the first `count` prompts joined."""
        return sum(folder.tokens for folder in self.folders[:count]) - SINKS * (count - 1) - self._held[count - 1]

    def pieces(self, length: int) -> list[tuple[TraceFolder, int, int]]:
        """Folder, first token and the one behind the last, of what makes a prompt of `length` tokens.

        Raises ValueError for a length below 1 or beyond what the traces have.
        """
        counts = [count for count in range(1, len(self.folders) + 1) if self._tokens(count) >= length]
        if length <= SINKS or not counts:
            raise ValueError(
                f"context_len: got {length}, allowed: {SINKS + 1} to {self.tokens}, the tokens of the traces together "
                f"({len(self.folders)} prompts, {self.steps} decode steps)"
            )
        count = counts[0]
        surplus, last = self._tokens(count) - length, count - 1
        found = [(self.folders[0], 0, SINKS)]
        for number, folder in enumerate(self.folders[:count]):
            stop = folder.tokens - (self._held[last] if number == last else 0)
            cut = min(surplus, stop - SINKS)
            surplus -= cut
            if SINKS + cut < stop:
                found.append((folder, SINKS + cut, stop))
        return found

    def wide_heads(self, layer: int, sequence: int) -> list[tuple[int, int]]:
        """Layer and first kv head in the traces of every kv head of a layer."""
        start = (layer + sequence) % len(self.layers)
        pool = [(number, head) for number in self.layers[start:] + self.layers[:start] for head in range(self.kv_heads)]
        return [pool[at % len(pool)] for at in range(self.shape.kv_heads)]

    def states(self, layer: int, sequence: int, length: int, dtype: torch.dtype) -> States:
        """A prompt of `length` tokens in a layer of a sequence of a batch. ValueError as `pieces`, TraceFolder.load."""
        shape, pieces = self.shape, self.pieces(length)
        heads = self.wide_heads(layer, sequence)
        sizes = [(count, number) for count in (length, self.steps) for number in (shape.heads, *[shape.kv_heads] * 2)]
        numbers = dict.fromkeys(number for number, _ in heads)
        known = numbers.keys() <= set(self._predicted(length))
        predicted = torch.empty(self.steps, shape.heads, shape.head_dim, dtype=dtype) if known else None
        made = States(*(torch.empty(*size, shape.head_dim, dtype=dtype) for size in sizes))
        for number in numbers:
            mine = [(at, first) for at, (source, first) in enumerate(heads) if source == number]
            begin = 0
            trace = None
            for at, (folder, start, stop) in enumerate(pieces):
                if at == 0 or folder is not pieces[at - 1][0]:
                    trace = folder.load(number)
                assert trace is not None
                prompt = (trace.queries[:, :, start:stop], trace.keys[:, start:stop], trace.values[:, start:stop])
                target = slice(begin, begin + stop - start)
                rows = (made.queries[target], made.keys[target], made.values[target])
                self._widen(prompt, rows, mine)
                begin += stop - start
            assert trace is not None
            self._widen(self._steps_of(trace), (made.step_queries, made.step_keys, made.step_values), mine)
            if predicted is not None:
                assert trace.predicted is not None
                start = trace.predicted.shape[2] - trace.tests.shape[2] - max(self.steps - trace.tests.shape[2], 0)
                self._widen_queries(trace.predicted[:, :, start : start + self.steps], predicted, mine)
        return replace(made, step_predicted=predicted)

    def _predicted(self, length: int) -> list[int]:
        """The layers with predicted queries of all steps behind a prompt of `length` tokens."""
        folder = self.pieces(length)[-1][0]
        held = self._held[self.folders.index(folder)]
        return [layer for layer in self.layers if folder.predicted.get(layer, -1) >= held]

    def _steps_of(self, trace: LayerTrace) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [Hkv, g, T, d], keys and values [Hkv, T, d] of the decode steps behind a prompt."""
        held = max(self.steps - trace.tests.shape[2], 0)
        stop = trace.keys.shape[1] - held
        places = torch.arange(stop, stop + self.steps)
        places[held:] = stop - 1 - torch.arange(self.steps - held).flip(0) % stop
        queries = torch.cat((trace.queries[:, :, stop:], trace.tests), 2)[:, :, : self.steps]
        return queries, trace.keys[:, places], trace.values[:, places]

    def _widen(
        self,
        source: tuple[Tensor, Tensor, Tensor],
        target: tuple[Tensor, Tensor, Tensor],
        heads: Sequence[tuple[int, int]],
    ) -> None:
        """Writes queries [kv, g, n, d], keys and values [kv, n, d] into [n, H, D] and twice [n, Hkv, D]; heads: kv head
        there and the first kv head here."""
        queries, *others = source
        self._widen_queries(queries, target[0], heads)
        for at, kv, _, columns in self._parts(heads):
            for states, made in zip(others, target[1:], strict=True):
                made[:, at, columns] = states[kv]

    def _widen_queries(self, queries: Tensor, target: Tensor, heads: Sequence[tuple[int, int]]) -> None:
        """As `_widen`, of queries alone."""
        group = self.shape.group
        for at, kv, part, columns in self._parts(heads):
            for member in range(group):
                chosen = (member + part * (member // self.group)) % self.group
                target[:, at * group + member, columns] = queries[kv, chosen]

    def _parts(self, heads: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int, slice]]:
        """Of every wide head its number, and of every kv head in it which one it is, its place and its columns."""
        for at, first in heads:
            for part in range(self.width):
                columns = slice(part * self.head_dim, (part + 1) * self.head_dim)
                yield at, (first + part) % self.kv_heads, part, columns

    def describe(self, length: int) -> dict[str, Any]:
        """How a prompt of `length` tokens is made: which tokens of which prompts, and from how many heads."""
        distinct = min(self.shape.kv_heads, len(self.layers) * self.kv_heads)
        return {
            "pieces": [[folder.name, start, stop] for folder, start, stop in self.pieces(length)],
            "trace_layers": self.layers,
            "trace_shape": {"kv_heads": self.kv_heads, "group": self.group, "head_dim": self.head_dim},
            "kv_heads_side_by_side": self.width,
            "distinct_kv_heads": distinct,
            "query_heads_made_of": min(self.group, self.shape.group),
            "predicted_layers": self._predicted(length),
            "steps_from_prompt": self._held[self.folders.index(self.pieces(length)[-1][0])],
        }
