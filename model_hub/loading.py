"""Finds a model by name, and loads its tokenizer and its weights."""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from model_hub.convert import build_llm
from model_hub.embedded import ADAPTER, EMBEDDED_NAMES, fetch_embedded, is_embedded
from model_hub.gguf_file import gguf_config, gguf_rope_divisors, gguf_tokenizer, load_gguf
from model_hub.llm import LLM
from model_hub.spec import ModelSpec, check_family

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NO_LORA = "none"
ALLOWED_NAMES = f"a model is {EMBEDDED_NAMES[0]}, a folder with config.json, a .gguf file or a hub name (owner/name)"
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights are: `gguf`, or else `name`, a local folder or a hub name."""

    name: str
    gguf: Path | None = None


def load_tokenizer(model_name: str, cache_dir: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model (names as in `load_model`); pads on the left, with the end token if it has no other."""
    source = find_model(model_name, cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(source.name) if source.gguf is None else gguf_tokenizer(source.gguf)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model_name: str,
    max_len: int | None,
    dtype: torch.dtype | str,
    device: str,
    tokenizer: Tokenizer | None = None,
    lora: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> LLM:
    """Loads a model of the Llama or Qwen family.

    model_name: "SmolLM2-135M-Instruct" (the default model, with its 64K adapter), a local folder, a .gguf file or a
    hub name. max_len: most tokens of prompt and answer together, None for the model's window. dtype: a torch dtype,
    "fp16", "bf16" or "fp32". device: "cpu", "cuda", "cuda:1", or "auto": layers split evenly over all GPUs, the CPU
    when there is none. tokenizer: its end token ends answers, beside those of the model's generation configuration.
    lora: a PEFT LoRA folder, merged in float32; its rope.json, if any, sets rope_theta and max_position_embeddings.
    "none" keeps even the default model without an adapter. cache_dir: where the default model is kept.

    Raises FileNotFoundError for a model or LoRA that does not exist, ValueError for a model, dtype, device or max_len
    that is not supported, RuntimeError when the default model cannot be fetched; all before weights are read.
    """
    torch_dtype, devices = _parse_dtype(dtype), _parse_devices(device)
    if max_len is not None and max_len < 1:
        raise ValueError(f"max_len must be at least 1, got {max_len}")
    lora_folder = _find_lora(model_name, lora)
    source = find_model(model_name, cache_dir)

    config = AutoConfig.from_pretrained(source.name) if source.gguf is None else gguf_config(source.gguf)
    rope_divisors = None if source.gguf is None else gguf_rope_divisors(source.gguf)
    if lora_folder is not None and (lora_folder / "rope.json").is_file():
        rope = json.loads((lora_folder / "rope.json").read_text(encoding="utf-8"))
        config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        config.max_position_embeddings = rope["max_position_embeddings"]
        rope_divisors = None
    spec = ModelSpec.from_config(config, model_name, rope_divisors)
    if max_len is None:
        max_len = spec.window
    if max_len > spec.window:
        raise ValueError(f"max_len {max_len} is above the {spec.window} positions of {model_name}")

    load_dtype = torch_dtype if lora_folder is None else torch.float32
    if source.gguf is not None:
        model = load_gguf(source.gguf, config, load_dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(source.name, config=config, dtype=load_dtype, use_safetensors=True)
    if lora_folder is not None:
        model = _merge_lora(model, lora_folder)
    return build_llm(model, spec, max_len, torch_dtype, devices, _eos_ids(model, tokenizer))


def find_model(name: str, cache_dir: str | Path | None = None) -> ModelSource:
    """Resolves a model name and checks that the model is one of the families; fetches the default model.

    Raises FileNotFoundError where nothing usable is, ValueError for another family.
    """
    if is_embedded(name):
        return ModelSource(str(fetch_embedded(cache_dir)))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model folder {name} has no config.json; a GGUF model is given by its .gguf file")
        name = str(path)
    elif path.is_file() or path.suffix == ".gguf" or not HUB_NAME.fullmatch(name):
        what = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"model {name} {what}; {ALLOWED_NAMES}")
    try:
        values, _ = PretrainedConfig.get_config_dict(name)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"model {name} cannot be read: {reason} ({ALLOWED_NAMES})") from error
    check_family(values.get("model_type"), name)
    return ModelSource(name)


def _find_lora(model_name: str, lora: str | Path | None) -> Path | None:
    if lora is None:
        return ADAPTER if is_embedded(model_name) else None
    if str(lora) == NO_LORA:
        return None
    folder = Path(lora).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"LoRA folder {lora} has no adapter_config.json; allowed: a PEFT folder, {NO_LORA!r}")
    return folder


def _merge_lora(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    from peft import PeftModel  # takes seconds to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a deprecated attribute
        return PeftModel.from_pretrained(model, str(folder), torch_device="cpu").merge_and_unload()


def _eos_ids(model: PreTrainedModel, tokenizer: Tokenizer | None) -> set[int]:
    generation: Any = model.generation_config
    stated = [generation.eos_token_id if generation is not None else None, model.config.eos_token_id]
    stated.append(tokenizer.eos_token_id if tokenizer is not None else None)
    return {id_ for entry in stated if entry is not None for id_ in (entry if isinstance(entry, list) else [entry])}


def _parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is not supported; allowed: {', '.join(DTYPES)} or their torch dtypes")
    return found


def _parse_devices(device: str) -> list[torch.device]:
    count = torch.cuda.device_count()
    if device == "auto":
        return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    allowed = ["auto", "cpu"] + (["cuda"] if count else []) + [f"cuda:{index}" for index in range(count)]
    if device not in allowed:
        raise ValueError(f"device {device!r} is not available; allowed here: {', '.join(allowed)}")
    return [torch.device("cuda", 0) if device == "cuda" else torch.device(device)]
