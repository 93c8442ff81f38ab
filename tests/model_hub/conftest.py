"""Tiny random models of each family, saved as folders, and the transformers model of SmolLM2 to compare with."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import byte_tokenizer, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from model_hub import embedded


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder with the named tiny model and its tokenizer."""

    def save(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / name
        if not folder.exists():
            tiny_model(name).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: object) -> PreTrainedModel:
    """SmolLM2 in transformers' own model, with the adapter added by hand as its README says."""
    folder = embedded.fetch_embedded()
    rope = json.loads((embedded.ADAPTER / "rope.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    config.max_position_embeddings = rope["max_position_embeddings"]
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    adapter = json.loads((embedded.ADAPTER / "adapter_config.json").read_text())
    states = load_file(embedded.ADAPTER / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    for name in [name for name in states if "lora_A" in name]:
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        update = states[name.replace("lora_A", "lora_B")].float() @ states[name].float()
        parameters[target].data += adapter["lora_alpha"] / adapter["r"] * update
    return model
