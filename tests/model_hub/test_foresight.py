"""Searches that begin with a predicted query, as a model's decode steps ask for them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import relative_error
from torch import Tensor

from cache_hub import KV_Cache
from cache_hub.layer_search import Foreseen, GraphLayerSearch
from cache_hub.retrieving_layers import RetrievingLayers
from config import RetroInferConfig
from model_hub import LLM, load_model


def steps(llm: LLM, lengths: list[int], count: int = 6, strategy: str = "attention_aware_graph", **graph: Any) -> Any:
    """Logits of some forced steps, and the cache."""
    knobs = {"top_k": 20, "ef_search": 40, "key_degree": 16, "key_links": 12, "insert_batch": 0, **graph}
    torch.manual_seed(0)
    ids = torch.randint(1, 256, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    cache = llm.init_cache(strategy, RetroInferConfig(attention_aware_graph=knobs), lengths, count, diagnose=True)
    llm.prefill(ids, mask.long(), cache)
    forced = torch.randint(1, 256, (count, len(lengths)))
    return torch.stack([llm.decode_step(tokens, cache) for tokens in forced]), cache


@pytest.fixture
def llm(tiny_folder: Any) -> LLM:
    return load_model(str(tiny_folder("llama")), 512, "fp32", "cpu")


@pytest.fixture
def hints(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Foreseen | None]]:
    """What every search was for, and what it began with; predictions are made on a CPU too."""
    seen, retrieve = [], GraphLayerSearch.retrieve

    def watched(self: GraphLayerSearch, buffers: Any, foreseen: Foreseen | None = None) -> Any:
        seen.append((buffers.queries.clone(), None if foreseen is None else Foreseen(foreseen.queries.clone(), 1)))
        return retrieve(self, buffers, foreseen)

    monkeypatch.setattr(GraphLayerSearch, "retrieve", watched)
    monkeypatch.setattr(RetrievingLayers, "foresees", lambda self, at: self.needs_host(at) and self._begins_early(at))
    return seen


@pytest.mark.parametrize("lengths", [[300], [300, 300], [280, 170]])
def test_every_layer_but_the_first_begins_with_its_predicted_query(
    llm: LLM, hints: Any, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: list[tuple[Tensor, ...]] = []
    project = type(llm.layers[0]).project

    def watched(self: Any, *given: Tensor) -> Any:
        inputs.append(tuple(states.clone() for states in given))
        return project(self, *given)

    _, cache = steps(llm, lengths)
    hints.clear()
    monkeypatch.setattr(type(llm.layers[0]), "project", watched)
    cache.rewind()
    llm.decode_step(torch.zeros(len(lengths), dtype=torch.int64), cache)
    assert len(hints) == len(inputs) == len(llm.layers)
    assert hints[0][1] is None
    for index, (_, hint) in list(enumerate(hints))[1:]:
        expected = llm.layers[index].predict_query(*inputs[index - 1])
        assert relative_error(hint.queries.view_as(expected), expected) < 1e-6


def test_what_is_found_is_as_good_and_counted(llm: LLM, hints: Any) -> None:
    recall = {}
    for ef in (0, 40):
        hints.clear()
        _, cache = steps(llm, [400], resume_ef=ef)
        agreement = cache.stats.agreement
        recall[ef] = agreement.mean(agreement.recall)[1:].mean().item(), cache.stats.scored
        assert any(hint is not None for _, hint in hints) == (ef > 0)
    assert recall[40][0] > recall[0][0] - 0.01
    assert recall[40][1] > 1.5 * recall[0][1], "keys are scored for both queries"


def test_a_beam_that_holds_all_keys_gives_the_same_with_and_without(llm: LLM, hints: Any) -> None:
    both = [steps(llm, [300, 280], ef_search=400, resume_ef=ef)[0] for ef in (0, 7)]
    assert any(hint is not None for _, hint in hints)
    assert relative_error(both[1], both[0]) < 1e-5


@pytest.mark.parametrize("strategy", ["flat", "hnsw", "full"])
def test_others_search_for_the_query_alone(llm: LLM, hints: Any, strategy: str) -> None:
    _, cache = steps(llm, [300], strategy=strategy)
    assert isinstance(cache, KV_Cache)
    assert not hints


def test_a_model_may_be_told_not_to_predict(llm: LLM, hints: Any) -> None:
    llm.predicts = False
    steps(llm, [300])
    assert hints
    assert all(hint is None for _, hint in hints)


def test_a_query_that_is_never_posted_is_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a GPU, whose queries are waited for; nothing comes here."""
    _, cache = steps(llm, [300])
    buffers = cache._buffers_of(1)
    posted = torch.full(buffers.queries.shape, -1, dtype=torch.int32).view(torch.float32)
    cache._buffers[torch.device("cpu")] = replace(buffers, posted=posted)
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with pytest.raises(RuntimeError, match="layer 1: the query was not posted"):
        cache.retrieve(1, None, False)
    assert waited == [torch.device("cpu")]


def test_a_search_that_was_begun_early_ends_with_the_query(llm: LLM) -> None:
    _, cache = steps(llm, [300])
    buffers, generator = cache._buffers_of(1), torch.Generator().manual_seed(1)
    query, near = torch.randn(2, *buffers.queries.shape, generator=generator).unbind()
    found = []
    for early in (False, True):
        cache.rewind()
        posted = torch.full(query.shape, -1, dtype=torch.int32).view(torch.float32)
        cache._buffers[torch.device("cpu")] = replace(buffers, posted=posted, foreseen=torch.stack((near, near)))
        if early:
            cache.expect_query(1)
        posted.copy_(query)
        cache.retrieve(1, None, True)
        assert torch.equal(buffers.queries, query)
        found.append(buffers.positions.clone())
    assert torch.equal(*found)
