"""The decoder computes what transformers' own models compute: logits within 1e-4 relative in float32."""

import pytest
import torch
from comparison import left_padded, reference_logits, relative_error
from tiny_models import TINY
from transformers import AutoModelForCausalLM

from model_hub import load_model


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_with_padding(name, tiny_folder):
    folder = tiny_folder(name)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llm = load_model(str(folder), 512, torch.float32, "cpu")
    ids, mask = left_padded([150, 1, 97], llm.spec.vocab_size)
    assert relative_error(llm.logits(ids, mask), reference_logits(reference, ids, mask)) < 1e-4


def test_the_comparison_can_fail(tiny_folder):
    folder = tiny_folder("llama-tied-llama3-rope")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llm = load_model(str(folder), 512, torch.float32, "cpu")
    llm.frequencies = llm.frequencies * 1.01
    ids, mask = left_padded([150], llm.spec.vocab_size)
    assert relative_error(llm.logits(ids, mask), reference_logits(reference, ids, mask)) > 1e-3


def test_smollm2_with_adapter(smollm2, smollm2_reference):
    llm, tokenizer = smollm2
    text = "The lighthouse keeper wrote 1247 letters, and kept every answer in a tin box under the stairs. " * 5
    batch = tokenizer([text, "Rain fell on the harbour."], return_tensors="pt", padding=True)
    assert batch.input_ids.shape[1] > 100
    got = llm.logits(batch.input_ids, batch.attention_mask)
    expected = reference_logits(smollm2_reference, batch.input_ids, batch.attention_mask)
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_mlp_equals_unchunked(chunk, tiny_folder):
    llm = load_model(str(tiny_folder("llama")), 512, torch.float32, "cpu")
    ids, mask = left_padded([100, 64], llm.spec.vocab_size)
    whole = llm.logits(ids, mask)
    llm.mlp_chunk = chunk
    assert relative_error(llm.logits(ids, mask), whole) < 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_near_float32(dtype, tiny_folder):
    folder = str(tiny_folder("qwen3"))
    ids, mask = left_padded([60], 256)
    full = load_model(folder, 512, "fp32", "cpu").logits(ids, mask)
    half = load_model(folder, 512, dtype, "cpu")
    assert half.dtype in (torch.bfloat16, torch.float16)
    assert relative_error(half.logits(ids, mask), full) < 0.1
