"""Fixtures that several rooms use."""

import os

import pytest
from transformers import PreTrainedTokenizerBase

from model_hub import LLM, load_model, load_tokenizer


@pytest.fixture(scope="session")
def smollm2() -> tuple[LLM, PreTrainedTokenizerBase]:
    """The default model with its adapter, float32 on the CPU, 16,384 tokens, and its tokenizer."""
    name = "SmolLM2-135M-Instruct"
    try:
        tokenizer = load_tokenizer(name)
    except RuntimeError as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))
    return load_model(name, 16384, "fp32", "cpu", tokenizer), tokenizer
