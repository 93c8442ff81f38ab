"""One decoder layer of the Llama and Qwen families: its weights, and the arithmetic around attention."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_hub import rotate
from model_hub.spec import ModelSpec


class Linear(NamedTuple):
    """weight [out, in] and bias [out]; call as F.linear(x, *linear)."""

    weight: Tensor
    bias: Tensor | None


@dataclass(eq=False, slots=True)
class DecoderLayer:
    """Weights of one layer on one device. H query heads, G kv heads of D dimensions, model width d, MLP width I.

    qkv: [(H + 2 G) D, d]; out: [d, H D]; gate_up: [2 I, d]; down: [d, I]; input_norm, post_norm: [d];
    q_norm, k_norm: [D], of Qwen3 only.
    """

    spec: ModelSpec
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.input_norm.device

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [b, L, d] -> rotated queries [b, L, H, D], rotated keys and values [b, L, G, D]."""
        spec = self.spec
        states = F.linear(self._norm(hidden, self.input_norm), *self.qkv).unflatten(-1, (-1, spec.head_dim))
        query, key, value = states.split([spec.num_heads, spec.num_key_value_heads, spec.num_key_value_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self._norm(query, self.q_norm), self._norm(key, self.k_norm)
            return rotate(query, cos, sin), rotate(key, cos, sin), value
        both = rotate(states[:, :, : -spec.num_key_value_heads], cos, sin)
        return both[:, :, : spec.num_heads], both[:, :, spec.num_heads :], value

    def predict_query(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden [b, L, d] that enters the layer before this one -> about the rotated queries [b, L, H, D] of project,
        since a layer adds little to what runs through it. Source: InfiniGen (arXiv 2406.19707)."""
        spec, rows = self.spec, self.spec.num_heads * self.spec.head_dim
        weight, bias = (None if states is None else states[:rows] for states in self.qkv)
        assert weight is not None
        query = F.linear(self._norm(hidden, self.input_norm), weight, bias).unflatten(-1, (-1, spec.head_dim))
        return rotate(query if self.q_norm is None else self._norm(query, self.q_norm), cos, sin)

    def project_prompt(self, hidden: Tensor, cos: Tensor, sin: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `project`, on `chunk` tokens at a time: of all tokens no states are held but hidden and the result."""
        spec, (batch, length, _) = self.spec, hidden.shape
        query, key, value = (
            hidden.new_empty(batch, length, heads, spec.head_dim)
            for heads in (spec.num_heads, spec.num_key_value_heads, spec.num_key_value_heads)
        )
        step = max(chunk // batch, 1)
        for start in range(0, length, step):
            tokens = slice(start, start + step)
            states = self.project(hidden[:, tokens], cos[:, tokens], sin[:, tokens])
            query[:, tokens], key[:, tokens], value[:, tokens] = states
        return query, key, value

    def finish(self, hidden: Tensor, attended: Tensor, mlp_chunk: int) -> Tensor:
        """Adds the output projection of attended [b, L, H, D] and the MLP to hidden [b, L, d], in place.

        On `mlp_chunk` tokens at a time: the MLP's [tokens, 2 I] states are the largest of a prefill.
        """
        chunks = (states.split(mlp_chunk) for states in (hidden.view(-1, hidden.shape[-1]), attended.flatten(0, 1)))
        for tokens, heads in zip(*chunks, strict=True):
            tokens += F.linear(heads.flatten(1), *self.out)
            gate, up = F.linear(self._norm(tokens, self.post_norm), *self.gate_up).chunk(2, dim=-1)
            tokens += F.linear(F.silu(gate, inplace=True).mul_(up), *self.down)
        return hidden

    def _norm(self, states: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(states, weight.shape, weight, self.spec.norm_eps)
