"""On GPUs the decoder computes what it computes on the CPU, on one device and split over all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import left_padded, relative_error
from transformers import AutoConfig, AutoModelForCausalLM

from config import RetroInferConfig, generate_config
from model_hub import LLM, load_model

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


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 4 layers with heads of 64 dimensions, 4 to a kv head."""
    torch.manual_seed(5)
    shape = {"vocab_size": 260, "hidden_size": 512, "intermediate_size": 384, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape, **heads), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    folder = tmp_path_factory.mktemp("four")
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("estimation", ["none", "centroid"])
@pytest.mark.parametrize(
    ("strategy", "resume_ef", "tolerance"),
    [("full", 0, 1e-3), ("attention_aware_graph", 0, 1e-3), ("attention_aware_graph", 100, 1e-2)],
)
def test_two_gpus_compute_what_one_does(
    strategy: str, resume_ef: int, tolerance: float, estimation: str, four_layers: Path
) -> None:
    """Prefill, build, decode and growth of the index, with half of the layers on each; 2 prompts together. The query of
    a GPU's first layer is not predicted, so that with resume_ef a search there finds other tokens now and then."""
    one, two = (load_model(str(four_layers), 4096, "fp32", device) for device in ("cuda:0", "auto"))
    assert len(set(two.layer_mapping.values())) == min(torch.cuda.device_count(), 4)
    # By the store alone, so that no rounding of a copy tells two equal keys apart.
    graph = {"top_k": 100, "estimation": estimation, "insert_batch": 8, "index_dtype": "auto", "resume_ef": resume_ef}
    settings = RetroInferConfig(attention_aware_graph=graph)
    ids, _ = left_padded([1500, 1500], 256)
    logits_of_one, tokens = forced(one, strategy, settings, ids, None)
    logits_of_two, _ = forced(two, strategy, settings, ids, tokens)
    assert relative_error(logits_of_two[0], logits_of_one[0]) < 1e-5, "of the prompt"
    assert relative_error(logits_of_two, logits_of_one) < tolerance
    config = {"RetroInfer": settings.model_dump()}
    answers = [llm.generate(strategy, ids, None, 24, config, prefill_bsz=2) for llm in (one, two)]
    assert resume_ef or answers[0] == answers[1]
    assert two.cache is not None
    assert [str(device) for device in two.cache.devices] == list(two.layer_mapping.values())


def forced(
    llm: LLM, strategy: str, settings: RetroInferConfig, ids: torch.Tensor, tokens: list[torch.Tensor] | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [1 + 20, B, V] behind the prompts and behind each of 20 tokens, those given or else the greedy ones; and
    the tokens."""
    cache: Any = llm.init_cache(strategy, settings, [ids.shape[1]] * len(ids), 24, prefill_bsz=2)
    logits = [llm.prefill(ids, None, cache, prefill_bsz=2).cpu()]
    fed = []
    for step in range(20):
        fed.append(logits[-1].argmax(-1) if tokens is None else tokens[step])
        logits.append(llm.decode_step(fed[-1], cache).cpu())
    return torch.stack(logits), fed
