"""A differentiable Llama whose projections are merged with the adapter anew for every step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from attn_hub import rotate
from model_hub.rotary import cos_sin
from model_hub.spec import ModelSpec

# Projections by their name in peft's target_modules: the module of a decoder layer that holds them.
PROJECTIONS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
# The adapter was trained with the first; the others serve GPUs that do not have it.
_GPU_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


class ProbeModel:
    """Frozen weights of a Llama (Touvron et al. 2023; grouped queries, no biases), stacked over its n layers.

    projections: [n, out, in] by name; input_norms, post_norms: [n, d]; embedding, head: [vocabulary, d]; norm: [d].
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
        """Copies the weights of a transformers model. ValueError where it is no Llama or has biases."""
        config, decoder = model.config, model.model
        if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
            raise ValueError(f"model: got {config.model_type!r}, allowed: 'llama' without biases")

        def stack(weights: list[Tensor]) -> Tensor:
            return torch.stack([weight.detach() for weight in weights]).to(device, dtype)

        self.spec = ModelSpec.from_config(config, config.model_type)
        self.device = device
        self.dtype = dtype
        self.projections = {
            name: stack([getattr(getattr(layer, module), name).weight for layer in decoder.layers])
            for name, module in PROJECTIONS.items()
        }
        self.input_norms = stack([layer.input_layernorm.weight for layer in decoder.layers])
        self.post_norms = stack([layer.post_attention_layernorm.weight for layer in decoder.layers])
        self.embedding = decoder.embed_tokens.weight.detach().to(device, dtype)
        self.head = model.lm_head.weight.detach().to(device, dtype)
        self.norm = decoder.norm.weight.detach().to(device, dtype)

    def hidden(self, ids: Tensor, projections: Mapping[str, Tensor]) -> Tensor:
        """ids [B, L] -> states [B, L, d] before the last norm, through these projections, causally, from position 0."""
        frequencies = self.spec.frequencies.to(self.device)
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        cos, sin = cos_sin(positions, frequencies, self.spec.rope_scaling, self.dtype)
        states = F.embedding(ids, self.embedding)
        layers = [dict(zip(projections, weights, strict=True)) for weights in zip(*projections.values(), strict=True)]
        for weights, input_norm, post_norm in zip(layers, self.input_norms, self.post_norms, strict=True):
            states = states + self._attend(self._normalise(states, input_norm), weights, cos, sin)
            states = states + _mlp(self._normalise(states, post_norm), weights)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """states [.., d] of hidden -> [.., vocabulary]."""
        return F.linear(self._normalise(states, self.norm), self.head)

    def _attend(self, states: Tensor, weights: Mapping[str, Tensor], cos: Tensor, sin: Tensor) -> Tensor:
        """states [B, L, d] -> [B, L, d]; cos, sin [1, L, 1, D / 2]."""
        head_dim = self.spec.head_dim
        query, key, value = (
            F.linear(states, weights[name]).unflatten(-1, (-1, head_dim)) for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        on_gpu = self.device.type == "cuda"
        with sdpa_kernel(_GPU_ATTENTION, set_priority=True) if on_gpu else nullcontext():
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
            )
        return F.linear(attended.transpose(1, 2).flatten(2), weights["o_proj"])

    def _normalise(self, states: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(states, weight.shape, weight, self.spec.norm_eps)


def _mlp(states: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    gated = F.silu(F.linear(states, weights["gate_proj"])) * F.linear(states, weights["up_proj"])
    return F.linear(gated, weights["down_proj"])
