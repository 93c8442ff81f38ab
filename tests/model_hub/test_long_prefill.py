"""A prompt in chunks of tokens: what is computed stays the same, and what is not needed is let go."""

import gc
import weakref
from typing import Any

import pytest
import torch
from comparison import left_padded, relative_error
from torch import Tensor

from config import RetroInferConfig
from model_hub import LLM, load_model
from model_hub.layers import DecoderLayer

FAMILIES = ["llama-biases-linear-rope", "qwen3"]


@pytest.mark.parametrize("chunk", [1, 7, 64, 150, 1000])
@pytest.mark.parametrize("name", FAMILIES)
def test_projections_in_chunks(name: str, chunk: int, tiny_folder: Any) -> None:
    """Of two prompts together, in a model with biases and one with norms of queries and keys."""
    llm = load_model(str(tiny_folder(name)), 512, "fp32", "cpu")
    layer = llm.layers[1]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 150, llm.spec.hidden_size, generator=generator)
    cos, sin = llm.cos_sin(torch.arange(150)[None])
    for got, expected in zip(
        layer.project_prompt(hidden, cos, sin, chunk), layer.project(hidden, cos, sin), strict=True
    ):
        assert got.is_contiguous()
        assert got.shape == expected.shape
        assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_a_predicted_query_of_what_enters_the_layer_is_its_query(name: str, tiny_folder: Any) -> None:
    llm = load_model(str(tiny_folder(name)), 512, "fp32", "cpu")
    hidden = torch.randn(2, 3, llm.spec.hidden_size, generator=torch.Generator().manual_seed(4))
    cos, sin = llm.cos_sin(torch.arange(3)[None])
    for layer in llm.layers:
        assert relative_error(layer.predict_query(hidden, cos, sin), layer.project(hidden, cos, sin)[0]) < 1e-6


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("strategy", ["full", "attention_aware_graph"])
def test_a_prefill_in_chunks(strategy: str, chunk: int, tiny_folder: Any) -> None:
    llm = load_model(str(tiny_folder("llama")), 512, "fp32", "cpu")
    llm.progress = False
    ids, _ = left_padded([150, 150], llm.spec.vocab_size)
    whole = prefilled(llm, strategy, ids)
    llm.mlp_chunk = chunk
    for got, expected in zip(prefilled(llm, strategy, ids), whole, strict=True):
        assert relative_error(got, expected) < 1e-5


@torch.inference_mode()
def prefilled(llm: LLM, strategy: str, ids: Tensor) -> tuple[Tensor, ...]:
    """Logits behind the prompts and behind one more token, and the cache's keys and values."""
    settings = RetroInferConfig(attention_aware_graph={"key_degree": 8, "key_links": 4, "top_k": 20})
    cache: Any = llm.init_cache(strategy, settings, [ids.shape[1]] * len(ids), 4, prefill_bsz=2)
    logits = llm.prefill(ids, None, cache, prefill_bsz=2)
    kept = [store[:, :, : ids.shape[1]].clone() for store in (*cache._keys, *cache._values)]
    return logits, llm.decode_step(torch.tensor([5, 6]), cache), *kept


def test_queries_keys_and_values_are_gone_before_the_mlp(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the attention's output before the next layer's."""
    llm = load_model(str(tiny_folder("llama")), 512, "fp32", "cpu")
    alive: list[weakref.ref[Tensor]] = []
    project, finish, seen = DecoderLayer.project_prompt, DecoderLayer.finish, []

    def projected(self: DecoderLayer, *given: Any) -> tuple[Tensor, ...]:
        gc.collect()
        assert not any(held() is not None for held in alive)
        states = project(self, *given)
        alive.extend(map(weakref.ref, states))
        return states

    def finished(self: DecoderLayer, hidden: Tensor, attended: Tensor, chunk: int) -> Tensor:
        gc.collect()
        seen.append(sum(held() is not None for held in alive))
        alive.append(weakref.ref(attended))
        return finish(self, hidden, attended, chunk)

    monkeypatch.setattr(DecoderLayer, "project_prompt", projected)
    monkeypatch.setattr(DecoderLayer, "finish", finished)
    ids, _ = left_padded([150], llm.spec.vocab_size)
    cache = llm.init_cache("attention_aware_graph", RetroInferConfig(), [150], 4)
    llm.prefill(ids, None, cache)
    assert seen == [0, 0, 0]
    assert len(alive) == 4 * 3


def test_of_a_prompt_read_only_the_last_state_is_kept(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the prompts of a batch that follow are read."""
    llm = load_model(str(tiny_folder("llama")), 512, "fp32", "cpu")
    forward, states, alive = LLM._forward, [], []

    def forwarded(self: LLM, *given: Any) -> Tensor:
        gc.collect()
        alive.append(sum(held() is not None for held in states))
        hidden = forward(self, *given)
        states.append(weakref.ref(hidden.untyped_storage()))
        return hidden

    monkeypatch.setattr(LLM, "_forward", forwarded)
    ids, mask = left_padded([60, 50, 40], llm.spec.vocab_size)
    llm.prefill(ids, mask, llm.init_cache("full", RetroInferConfig(), [60, 50, 40], 4))
    assert alive == [0, 0, 0]
