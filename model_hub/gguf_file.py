"""GGUF files of the Llama and Qwen families -> transformers models.

Names and layouts follow llama.cpp's converter. transformers' own reader is not used: it takes 13 s where this takes 4
(SmolLM2, 2 cores), marks the model as quantised, and leaves out Llama 3.1's frequency factors and Qwen3's head_dim.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from model_hub.spec import check_family

ROPE_DIVISORS = "rope_freqs.weight"
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, eq=False)
class GgufFile:
    """`fields`: scalars and texts of the file's metadata; `tensors`: its tensors by name, mapped, not yet read."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]

    @property
    def architecture(self) -> str:
        return self.fields["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value of the architecture's own section, such as "block_count"."""
        return self.fields.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path}: metadata key {self.architecture}.{key} is missing")
        return value

    def read(self, name: str) -> Tensor:
        """One tensor, dequantised to float32."""
        tensor = self.tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


@lru_cache(maxsize=1)
def open_gguf(path: Path) -> GgufFile:
    """Reads a file's metadata; no weights. ValueError when it is no GGUF file or of an architecture not supported."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error})") from error
    fields = {
        name: field.contents() for name, field in reader.fields.items() if field.types[:1] != [gguf.GGUFValueType.ARRAY]
    }
    check_family(fields.get("general.architecture"), str(path))
    return GgufFile(path, fields, {tensor.name: tensor for tensor in reader.tensors})


def gguf_config(file: GgufFile) -> PretrainedConfig:
    """The transformers configuration that a file's metadata describes. ValueError for what it cannot express."""
    if file.get("expert_count", 0):
        raise ValueError(f"{file.path}: mixture-of-experts models are not supported")
    head_num, hidden = file.need("attention.head_count"), file.need("embedding_length")
    return AutoConfig.for_model(
        file.architecture,
        vocab_size=int(file.tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden,
        intermediate_size=file.need("feed_forward_length"),
        num_hidden_layers=file.need("block_count"),
        num_attention_heads=head_num,
        num_key_value_heads=file.get("attention.head_count_kv", head_num),
        head_dim=file.get("attention.key_length", hidden // head_num),
        max_position_embeddings=file.need("context_length"),
        rms_norm_eps=file.need("attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope_parameters(file),
        attention_bias="blk.0.attn_output.bias" in file.tensors,
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.fields.get("tokenizer.ggml.eos_token_id"),
    )


def gguf_rope_divisors(file: GgufFile) -> Tensor | None:
    """Divisors [head_dim / 2] of the rotary frequencies, which Llama 3.1 files carry as a tensor."""
    return file.read(ROPE_DIVISORS) if ROPE_DIVISORS in file.tensors else None


def load_gguf(file: GgufFile, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Reads all weights into a transformers model on the CPU. ValueError when tensors are missing or unknown."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    states = {
        _hugging_face_name(name): _restore_pairs(file, config, name).to(dtype)
        for name in tqdm(file.tensors, desc="read GGUF", unit="tensor", disable=None, leave=False)
        if name != ROPE_DIVISORS
    }
    missing, unexpected = model.load_state_dict(states, strict=False, assign=True)
    missing = [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if missing or unexpected:
        raise ValueError(f"{file.path}: tensors missing: {missing}; not known: {unexpected}")
    model.tie_weights()
    return model


def _hugging_face_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}" if block == "blk" and part in LAYER_NAMES else name


def _restore_pairs(file: GgufFile, config: PretrainedConfig, name: str) -> Tensor:
    """Reads a tensor; undoes the interleaving of rotated pairs, with which llama.cpp stores Llama's q and k."""
    weight = file.read(name)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if file.architecture != "llama" or heads is None:
        return weight
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _rope_parameters(file: GgufFile) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": file.get("rope.freq_base", 10000.0)}
    kind = file.get("rope.scaling.type", "none")
    if kind != "none":
        parameters |= {"rope_type": kind, "factor": file.need("rope.scaling.factor")}
        if original := file.get("rope.scaling.original_context_length"):
            parameters["original_max_position_embeddings"] = original
    return parameters
