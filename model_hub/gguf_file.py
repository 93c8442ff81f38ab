"""GGUF files of the Llama and Qwen families, read by transformers; what it would read wrongly is mended or refused."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from model_hub.spec import check_family


@lru_cache(maxsize=1)
def open_gguf(path: Path) -> gguf.GGUFReader:
    """Reads a file's metadata; no weights.

    Raises ValueError when it is no GGUF file, of an architecture that is not supported, a mixture of experts, or with
    a rope scaling in its metadata, which transformers drops.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error})") from error
    check_family(_field(reader, "general.architecture"), str(path))
    if _own_field(reader, "expert_count"):
        raise ValueError(f"{path}: mixture-of-experts models are not supported")
    if (scaling := _own_field(reader, "rope.scaling.type")) not in (None, "none"):
        raise ValueError(f"{path}: rope scaling {scaling!r} is not read from GGUF files; use the model's folder")
    return reader


def gguf_config(path: Path) -> PretrainedConfig:
    """The transformers configuration that a file's metadata describes."""
    reader = open_gguf(path)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    # transformers leaves Qwen3's head size at its default
    config.head_dim = _own_field(reader, "attention.key_length") or config.hidden_size // config.num_attention_heads
    return config


def gguf_rope_divisors(path: Path) -> Tensor | None:
    """Divisors [head_dim / 2] of the rotary frequencies, a tensor in files of Llama 3.1 that transformers drops."""
    for tensor in open_gguf(path).tensors:
        if tensor.name == "rope_freqs.weight":
            return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    return None


def gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a file's metadata describes."""
    reader = open_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if _field(reader, "tokenizer.ggml.pre") == "smollm":
        # transformers knows no "smollm" and would join spaces to the digit behind them
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def load_gguf(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Reads all weights, dequantised, into a transformers model on the CPU. ValueError when tensors are missing."""
    model, report = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{path}: tensors missing: {missing}")
    return model


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _own_field(reader: gguf.GGUFReader, name: str) -> Any:
    """A metadata value of the architecture's own section, such as "block_count"."""
    return _field(reader, f"{_field(reader, 'general.architecture')}.{name}")
