"""On GPUs the decoder computes what it computes on the CPU, on one device and split over all of them."""

import pytest
import torch
from comparison import left_padded, relative_error

from config import generate_config
from model_hub import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cuda", "auto"])
@pytest.mark.parametrize("name", ["llama-tied-llama3-rope", "qwen3"])
def test_logits_and_tokens_equal_the_cpu(name, device, tiny_folder):
    folder = str(tiny_folder(name))
    config = generate_config(folder, 100, "Full_Flash_Attn")
    on_cpu, on_gpu = load_model(folder, 512, "fp32", "cpu"), load_model(folder, 512, "fp32", device)
    ids, mask = left_padded([150, 41], 256)
    assert relative_error(on_gpu.logits(ids, mask).cpu(), on_cpu.logits(ids, mask)) < 1e-4
    tokens = [llm.generate("Full_Flash_Attn", ids, mask, 16, config) for llm in (on_cpu, on_gpu)]
    assert tokens[0] == tokens[1]
    assert len(set(on_gpu.layer_mapping.values())) == (min(torch.cuda.device_count(), 3) if device == "auto" else 1)
