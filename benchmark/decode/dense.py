"""A decoder with random weights of the true shape around recorded attention states: good for times alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from model_hub.layers import DecoderLayer, Linear
from model_hub.llm import LLM
from model_hub.spec import ModelSpec

from .bandwidth import synchronize
from .extended import Shape


@dataclass(frozen=True)
class DenseSizes:
    """Model width, width of the MLP, and rows of the output projection."""

    hidden: int
    mlp: int
    vocab: int


@dataclass(frozen=True)
class StepStates:
    """The decode steps of all layers where they compute: queries [T, layers, B, 1, H, D], keys and values
    [T, layers, B, 1, Hkv, D]; predicted [T, layers, B, 1, H, D]: what a model predicted the queries to be, zeros in the
    first layer, which nothing is before; None where they are not recorded."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    predicted: Tensor | None = None


class RecordedLayer(DecoderLayer):
    """A decoder layer that computes all that one does, and whose attention then gets recorded states, whatever was
    projected or predicted. states: query [B, 1, H, D], key and value [B, 1, Hkv, D]; predicted [B, 1, H, D]; rewritten
    for every step."""

    __slots__ = ("predicted", "states")
    states: tuple[Tensor, ...]
    predicted: Tensor

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        super().project(hidden, cos, sin)
        query, key, value = self.states
        return query, key, value

    def predict_query(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        super().predict_query(hidden, cos, sin)
        return self.predicted


def random_weights(
    shape: Shape, sizes: DenseSizes, layers: int, device: str, dtype: torch.dtype
) -> Iterator[tuple[Any, ...]]:
    """The fields of DecoderLayer for so many layers, each with weights of its own."""
    dim, width = shape.head_dim, sizes.hidden
    frequencies = 500_000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    heads = (shape.heads, shape.kv_heads, dim)
    spec = ModelSpec(
        "llama", sizes.vocab, width, layers, *heads, norm_eps=1e-5, window=1, frequencies=frequencies, rope_scaling=1.0
    )

    def linear(rows: int, columns: int) -> Linear:
        return Linear(torch.randn(rows, columns, device=device, dtype=dtype) * columns**-0.5, None)

    norm = torch.ones(width, device=device, dtype=dtype)
    for _ in range(layers):
        yield (
            spec,
            linear((shape.heads + 2 * shape.kv_heads) * dim, width),
            linear(width, shape.heads * dim),
            linear(2 * sizes.mlp, width),
            linear(width, sizes.mlp),
            norm,
            norm,
            None,
            None,
        )


def around(layers: Sequence[DecoderLayer], sizes: DenseSizes) -> LLM:
    """A model of these layers; its random output projection is the embedding too."""
    norm = layers[0].input_norm
    head = torch.randn(sizes.vocab, sizes.hidden, device=norm.device, dtype=norm.dtype) * sizes.hidden**-0.5
    llm = LLM(layers[0].spec, list(layers), head, norm, head, max_length=1 << 30, eos_ids=())
    llm.progress = False
    return llm


class DenseModel:
    """An LLM of some layers, each with weights of its own, and the output projection; `show` tells it the states of a
    step, and to predict no query where there are no predictions among them.

    layer_bytes, head_bytes: what one step reads of a layer's weights, and of the output projection's; layer_ms and
    head_ms: what they take without any attention, once `measure` was called.
    """

    def __init__(
        self, shape: Shape, sizes: DenseSizes, layers: int, batch: int, device: str, dtype: torch.dtype
    ) -> None:
        self.device, dim = device, shape.head_dim
        counts = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        self._shown = [torch.zeros(layers, batch, 1, count, dim, device=device, dtype=dtype) for count in counts]
        made = [RecordedLayer(*weights) for weights in random_weights(shape, sizes, layers, device, dtype)]
        for number, layer in enumerate(made):
            query, key, value, layer.predicted = (states[number] for states in self._shown)
            layer.states = query, key, value
        self.llm = around(made, sizes)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        first = made[0]
        linears = (first.qkv, first.out, first.gate_up, first.down)
        self.layer_bytes = sum(one.weight.nbytes for one in linears)
        self.head_bytes = self.llm.lm_head.nbytes
        self.layer_ms = self.head_ms = 0.0

    @property
    def layers(self) -> Sequence[DecoderLayer]:
        return self.llm.layers

    def show(self, steps: StepStates, step: int) -> None:
        """Lets the layers' attention get the states of a step."""
        self.llm.predicts = steps.predicted is not None
        for shown, states in zip(self._shown, (steps.queries, steps.keys, steps.values, steps.predicted), strict=True):
            if states is not None:
                shown.copy_(states[step])

    @torch.inference_mode()
    def measure(self, warmup: int, steps: int) -> None:
        """Medians over the steps of a layer's and the output projection's milliseconds, without any attention; on a GPU
        replayed as CUDA graphs."""
        hidden = torch.randn(len(self.tokens), 1, self.llm.spec.hidden_size, device=self.device, dtype=self.llm.dtype)
        cos, sin = self.llm.cos_sin(torch.zeros(len(self.tokens), 1, device=self.device))

        def all_layers() -> None:
            states = hidden.clone()
            for layer in self.layers:
                query, _, _ = layer.project(states, cos, sin)
                layer.finish(states, query, self.llm.mlp_chunk)

        layers = _median_ms(all_layers, warmup, steps, self.device)
        self.layer_ms = layers / len(self.layers)
        self.head_ms = _median_ms(lambda: self.llm.project_out(hidden[:, -1]), warmup, steps, self.device)


def _median_ms(work: Callable[[], object], warmup: int, steps: int, device: str) -> float:
    if torch.device(device).type == "cuda":
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay
    took = []
    for _ in range(warmup + steps):
        synchronize(device)
        begin = perf_counter()
        work()
        synchronize(device)
        took.append(perf_counter() - begin)
    return statistics.median(took[warmup:]) * 1e3
