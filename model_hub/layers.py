"""One decoder layer of the Llama and Qwen families: its weights, and the arithmetic around attention."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model_hub.rotary import rotate
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

    def finish(self, hidden: Tensor, attended: Tensor, mlp_chunk: int) -> Tensor:
        """Adds the output projection of attended [b, L, H, D] and the MLP to hidden [b, L, d], in place.

        The MLP runs on `mlp_chunk` tokens at a time: its [tokens, 2 I] states are the largest of a prefill.
        """
        hidden += F.linear(attended.flatten(2), *self.out)
        for tokens in hidden.view(-1, hidden.shape[-1]).split(mlp_chunk):
            gate, up = F.linear(self._norm(tokens, self.post_norm), *self.gate_up).chunk(2, dim=-1)
            tokens += F.linear(F.silu(gate) * up, *self.down)
        return hidden

    def _norm(self, states: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(states, weight.shape, weight, self.spec.norm_eps)
