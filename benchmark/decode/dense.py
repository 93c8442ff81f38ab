"""What a decoder computes beside attention, with random weights of the true shape: good for times alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from model_hub.layers import DecoderLayer, Linear
from model_hub.rotary import cos_sin
from model_hub.spec import ModelSpec

from .bandwidth import synchronize
from .extended import Shape

_MLP_CHUNK = 65536


@dataclass(frozen=True)
class DenseSizes:
    """Model width, width of the MLP, and rows of the output projection."""

    hidden: int
    mlp: int
    vocab: int


class DensePieces:
    """Projections, norms, rotation and MLP of some layers, each with weights of its own, and the output projection.

    layer_bytes, head_bytes: what one step reads of a layer's weights, and of the output projection's; layer_ms and
    head_ms: what they take without any attention, once `measure` was called.
    """

    def __init__(
        self, shape: Shape, sizes: DenseSizes, layers: int, batch: int, device: str, dtype: torch.dtype
    ) -> None:
        self.device, dim, width = device, shape.head_dim, sizes.hidden
        frequencies = 500_000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
        heads = (shape.heads, shape.kv_heads, dim)
        self.spec = ModelSpec(
            "llama", sizes.vocab, width, shape.layers, *heads, norm_eps=1e-5, window=1, frequencies=frequencies,
            rope_scaling=1.0,
        )  # fmt: skip

        def linear(rows: int, columns: int) -> Linear:
            return Linear(torch.randn(rows, columns, device=device, dtype=dtype) * columns**-0.5, None)

        self.norm = torch.ones(width, device=device, dtype=dtype)
        self.layers = [
            DecoderLayer(
                self.spec,
                linear((shape.heads + 2 * shape.kv_heads) * dim, width),
                linear(width, shape.heads * dim),
                linear(2 * sizes.mlp, width),
                linear(width, sizes.mlp),
                self.norm,
                self.norm,
                None,
                None,
            )
            for _ in range(layers)
        ]
        self.head = linear(sizes.vocab, width).weight
        self.hidden = torch.randn(batch, 1, width, device=device, dtype=dtype)
        self.attended = torch.randn(batch, 1, shape.heads, dim, device=device, dtype=dtype)
        self.cos, self.sin = cos_sin(torch.zeros(batch, 1, device=device), frequencies, 1.0, dtype)
        first = self.layers[0]
        linears = (first.qkv, first.out, first.gate_up, first.down)
        self.layer_bytes = sum(one.weight.nbytes for one in linears)
        self.head_bytes = self.head.nbytes
        self.layer_ms = self.head_ms = 0.0

    def around(self, hidden: Tensor, layer: int, attention: Callable[[], Tensor]) -> Tensor:
        """A layer with what `attention` gives, [B, 1, H, D], whatever was projected. Changes hidden [B, 1, d]."""
        self.layers[layer].project(hidden, self.cos, self.sin)
        return self.layers[layer].finish(hidden, attention(), _MLP_CHUNK)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, 1, V] float32."""
        return F.linear(F.rms_norm(hidden, self.norm.shape, self.norm, self.spec.norm_eps), self.head).float()

    def measure(self, warmup: int, steps: int) -> None:
        """Medians over the steps of a layer's and the output projection's milliseconds."""
        layers, heads = [], []
        for _ in range(warmup + steps):
            synchronize(self.device)
            begin, hidden = perf_counter(), self.hidden.clone()
            for layer in range(len(self.layers)):
                hidden = self.around(hidden, layer, lambda: self.attended)
            synchronize(self.device)
            between = perf_counter()
            self.logits(hidden)
            synchronize(self.device)
            layers.append((between - begin) / len(self.layers))
            heads.append(perf_counter() - between)
        self.layer_ms, self.head_ms = (statistics.median(took[warmup:]) * 1e3 for took in (layers, heads))
