"""Short names of the models that the benchmarks' own scripts name."""

from __future__ import annotations

SHORT_NAMES = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3-8b-1048k": "gradientai/Llama-3-8B-Instruct-Gradient-1048k",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B-Instruct",
    "smollm2-135m": "SmolLM2-135M-Instruct",
}


def full_name(model: str) -> str:
    """The model that a short name stands for, in any case of letters; any other name as it is."""
    return SHORT_NAMES.get(model.lower(), model)
