"""From a transformers model to this project's decoder: fused matrices, each layer on its device."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_hub.layers import DecoderLayer, Linear
from model_hub.llm import LLM
from model_hub.spec import ModelSpec


def build_llm(
    model: PreTrainedModel,
    spec: ModelSpec,
    max_length: int,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    eos_ids: Collection[int],
) -> LLM:
    """Moves the weights of a Llama or Qwen model into an `LLM`, layers split evenly and in order over `devices`.

    The layers are taken out of `model`, one after the other, so that host memory never holds them twice: `model`
    cannot be used afterwards.
    """
    decoder = model.model
    layers = []
    for index in range(spec.layer_num):
        device = devices[index * len(devices) // spec.layer_num]
        layers.append(_build_layer(decoder.layers.pop(0), spec, device, dtype))
    first, last = layers[0].device, layers[-1].device
    embedding = _place(decoder.embed_tokens.weight, first, dtype)
    tied = model.lm_head.weight is decoder.embed_tokens.weight
    lm_head = embedding.to(last) if tied else _place(model.lm_head.weight, last, dtype)
    return LLM(spec, layers, embedding, _place(decoder.norm.weight, last, dtype), lm_head, max_length, eos_ids)


def _build_layer(layer: Any, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return DecoderLayer(
        spec=spec,
        qkv=_fuse([attention.q_proj, attention.k_proj, attention.v_proj], device, dtype),
        out=_fuse([attention.o_proj], device, dtype),
        gate_up=_fuse([mlp.gate_proj, mlp.up_proj], device, dtype),
        down=_fuse([mlp.down_proj], device, dtype),
        input_norm=_place(layer.input_layernorm.weight, device, dtype),
        post_norm=_place(layer.post_attention_layernorm.weight, device, dtype),
        q_norm=None if q_norm is None else _place(q_norm.weight, device, dtype),
        k_norm=None if k_norm is None else _place(k_norm.weight, device, dtype),
    )


def _fuse(parts: list[nn.Linear], device: torch.device, dtype: torch.dtype) -> Linear:
    """Stacks the outputs of linear maps of one input."""
    weights = [_place(part.weight, device, dtype) for part in parts]
    biases = [_place(part.bias, device, dtype) for part in parts if part.bias is not None]
    return Linear(
        torch.cat(weights) if len(weights) > 1 else weights[0],
        torch.cat(biases) if biases else None,
    )


def _place(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(device, dtype)
