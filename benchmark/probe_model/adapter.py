"""The LoRA adapter (Hu et al. 2021, arXiv 2106.09685) on every projection, and its files in peft's layout."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmark.results import write_json

from .model import PROJECTIONS, ProbeModel

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Adapter:
    """Float32 factors stacked over the n layers: `first` [n, rank, in] and `second` [n, out, rank] by projection (A and
    B in the paper). Merged, a projection is its weight + alpha / rank * second @ first.
    """

    def __init__(self, model: ProbeModel, rank: int, alpha: int, seed: int = 0) -> None:
        """Random `first`, uniform within 1 / sqrt(in), and zero `second`: at first the merged model is the base."""
        generator = torch.Generator().manual_seed(seed)
        self.rank, self.alpha = rank, alpha
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        for name, weight in model.projections.items():
            layers, out_size, in_size = weight.shape
            drawn = (torch.rand(layers, rank, in_size, generator=generator) * 2 - 1) / math.sqrt(in_size)
            self.first[name] = drawn.to(model.device).requires_grad_()
            self.second[name] = torch.zeros(layers, out_size, rank, device=model.device).requires_grad_()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.first:
            yield f"{name}.lora_A", self.first[name]
            yield f"{name}.lora_B", self.second[name]

    def merge(self, model: ProbeModel) -> dict[str, Tensor]:
        """The model's projections with the adapter added in float32, in the model's dtype; gradients flow back."""
        scale = self.alpha / self.rank
        return {
            name: (weight.float() + scale * torch.bmm(self.second[name], self.first[name])).to(weight.dtype)
            for name, weight in model.projections.items()
        }

    def save(self, folder: Path, rope_theta: float, max_positions: int) -> None:
        """Writes the adapter in bfloat16 as peft does, and rope.json, which model_hub.load_model obeys."""
        states = {}
        for name, parameter in self.named_parameters():
            for layer, factor in enumerate(parameter.detach().to("cpu", torch.bfloat16)):
                states[_peft_name(layer, name)] = factor.contiguous()
        save_whole(states, folder / _WEIGHTS, {"format": "pt"})
        write_json(
            folder / _CONFIG,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": self.rank,
                "lora_alpha": self.alpha,
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
                "init_lora_weights": True,
                "use_rslora": False,
                "modules_to_save": None,
                "target_modules": list(PROJECTIONS),
                "base_model_name_or_path": _BASE_MODEL,
            },
        )
        write_json(folder / "rope.json", {"rope_theta": rope_theta, "max_position_embeddings": max_positions})

    @classmethod
    def load(cls, folder: Path, model: ProbeModel) -> Adapter:
        """Reads what `save` wrote for a model of the same shape."""
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        states = load_file(folder / _WEIGHTS)
        adapter = cls(model, config["r"], config["lora_alpha"])
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                layers = range(len(parameter))
                parameter.copy_(torch.stack([states[_peft_name(layer, name)] for layer in layers]))
        return adapter


def save_whole(states: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    save_file(states, part, metadata)
    part.chmod(0o644)  # safetensors writes for the owner alone
    os.replace(part, path)


def _peft_name(layer: int, name: str) -> str:
    projection, factor = name.split(".")
    return f"base_model.model.model.layers.{layer}.{PROJECTIONS[projection]}.{projection}.{factor}.weight"
