"""Decoder models of the Llama and Qwen families, their loading, and generation through a KV cache."""

from model_hub.llm import LLM, GenerationTiming
from model_hub.loading import load_model, load_tokenizer
from model_hub.prefix import Prefix
from model_hub.sampling import Sampler
from model_hub.spec import ModelSpec

__all__ = ["LLM", "GenerationTiming", "ModelSpec", "Prefix", "Sampler", "load_model", "load_tokenizer"]
