"""Work behind the caller, and the builds that are finished by it beside a GPU."""

import threading
import time
from typing import Any

import pytest
import torch
from cache_run import LAYERS, Run

from cache_hub import make_cache
from cache_hub.background import BackgroundWork
from cache_hub.index import AttentionAwareGraphIndex, _native, make_index
from cache_hub.index.knn import causal_knn, key_knn
from cache_hub.retrieval_cache import TokenIndexCache
from config import RetroInferConfig

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def threads() -> int:
    return sum(thread.name.startswith("background") for thread in threading.enumerate())


def test_work_is_done_in_order_and_the_thread_goes() -> None:
    work, done, before = BackgroundWork(2), [], threads()
    for number in range(5):
        work.put(lambda number=number: done.append((number, threading.current_thread() is threading.main_thread())))
    work.finish()
    assert done == [(number, False) for number in range(5)]
    assert threads() == before
    work.finish()
    work.put(lambda: done.append((5, False)))
    work.finish()
    assert done[-1] == (5, False), "another prompt"


def test_no_more_than_two_pieces_are_left_at_a_time() -> None:
    work, may_end, third = BackgroundWork(2), threading.Event(), threading.Event()
    for _ in range(2):
        work.put(lambda: may_end.wait(10) or None)
    caller = threading.Thread(target=lambda: (work.put(lambda: None), third.set()))
    caller.start()
    assert not third.wait(0.1)
    may_end.set()
    assert third.wait(10)
    caller.join()
    work.finish()


def nothing() -> None:
    pass


def failing() -> None:
    raise ValueError("no links")


def test_an_error_is_raised_by_the_next_call() -> None:
    work = BackgroundWork(1)
    work.put(failing)
    with pytest.raises(ValueError, match="no links"):
        work.put(nothing)
    work.finish()
    work.put(failing)
    with pytest.raises(ValueError, match="no links"):
        work.finish()
    work.finish()


def test_work_that_nobody_waits_for_is_done_and_its_thread_goes() -> None:
    before, done = threads(), threading.Event()
    work = BackgroundWork(2)

    def slow() -> None:
        time.sleep(0.05)
        done.set()

    work.put(slow)
    del work
    assert done.wait(10)
    end = time.monotonic() + 10
    while threads() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() == before


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode_is_the_callers(inference: bool) -> None:
    work, seen = BackgroundWork(1), []
    with torch.inference_mode(inference):
        work.put(lambda: seen.append(torch.is_inference_mode_enabled()))
    work.finish()
    assert seen == [inference]


def built(index: Any) -> list[torch.Tensor]:
    assert isinstance(index, AttentionAwareGraphIndex)
    return [index.adjacency, index.entries, torch.tensor(index.repaired_keys)]


class Copied:
    """An event that has happened."""

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("index_dtype", ["auto", "bfloat16", "int8"])
def test_the_rest_of_a_build_makes_the_native_graph(device: str, index_dtype: str) -> None:
    """The CPU's half alone, of links that the kernels made."""
    torch.manual_seed(0)
    # Whole numbers: every order of summation gives the same product, and there are ties.
    keys, queries = torch.randint(-2, 3, (2, 200, 64)).float(), torch.randint(-2, 3, (2, 3, 200, 64)).float()
    options = {"key_degree": 8, "key_links": 4, "q_knn": 12, "key_metric": "cosine", "index_dtype": index_dtype}
    whole, halves = (make_index("attention_aware_graph", **options) for _ in range(2))
    whole.build(keys, queries, torch.arange(200))
    by_query, by_key = causal_knn(keys, queries, torch.arange(200), 12), key_knn(keys, 8)
    links = halves._project(*(tensor.to(device) for tensor in (keys, by_query, by_key)), 8).cpu()
    halves._finish(keys, None, links, by_query[..., 0].contiguous(), Copied())
    assert all(torch.equal(*both) for both in zip(built(whole), built(halves), strict=True))
    asked = torch.randn(2, 3, 64)
    assert torch.equal(whole.search(asked, 10).ids, halves.search(asked, 10).ids)
    assert halves.build_seconds.keys() == {"links_copy", "keys_copy", "repair", "pack"}


def prefilled(run: Run, estimation: str = "centroid", index_dtype: str = "auto") -> Any:
    settings = RetroInferConfig()
    update = {"estimation": estimation, "index_dtype": index_dtype, "key_degree": 16, "key_links": 8}
    graph = settings.attention_aware_graph.model_copy(update=update)
    settings = settings.model_copy(update={"attention_aware_graph": graph})
    return make_cache("attention_aware_graph", settings, **run.common(dtype=torch.float32))


def beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on states are said to be on their way, and the whole build of a graph is left to the thread."""
    put, start = TokenIndexCache._put, AttentionAwareGraphIndex.start

    def begun(cache: TokenIndexCache, *given: Any) -> Any:
        put(cache, *given)
        return Copied()

    def later(index: AttentionAwareGraphIndex, keys: torch.Tensor, *given: Any, keys_there: torch.Tensor) -> Any:
        assert keys_there.is_contiguous()
        assert torch.equal(keys_there, keys)
        return lambda: start(index, keys, *given)()

    monkeypatch.setattr(TokenIndexCache, "_put", begun)
    monkeypatch.setattr(AttentionAwareGraphIndex, "start", later)


@pytest.mark.parametrize("lengths", [[400], [300, 350]])
def test_a_cache_waits_for_its_layers(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    run, before, decoded = Run(lengths), threads(), []
    for _ in range(2):
        cache = prefilled(run)
        run.prefill(cache)
        assert threads() == before
        assert all(group.index.build_seconds["projection"] > 0 for groups in cache._groups for group in groups)
        assert cache.stats.seconds["projection"] > 0
        decoded.append(run.decode(cache))
        beside_a_gpu(monkeypatch)
    assert torch.equal(*decoded)


def test_a_caches_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run([400])
    cache = prefilled(run)
    beside_a_gpu(monkeypatch)

    def broken(*given: Any) -> int:
        raise RuntimeError("no links")

    monkeypatch.setattr(_native, "build", broken)
    with pytest.raises(RuntimeError, match="no links"):
        run.prefill(cache)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("index_dtype", ["auto", "int8"])
@pytest.mark.parametrize("lengths", [[3000], [1000, 1500]])
def test_layers_finished_behind_the_gpu_are_those_built_one_by_one(lengths: list[int], index_dtype: str) -> None:
    """States are stored, and every graph is the one that a build of these states alone makes."""
    run = Run(lengths, device="cuda:0")
    cache = prefilled(run, index_dtype=index_dtype)
    before = threads()
    with torch.inference_mode():
        run.prefill(cache)
    assert threads() == before
    for layer in range(LAYERS):
        for b, length in enumerate(lengths):
            own = slice(max(lengths) - length, max(lengths))
            assert torch.equal(cache._keys[layer][b, :, :length].transpose(0, 1), run.k[layer, b, own].cpu())
            assert torch.equal(cache._values[layer][b, :, :length].transpose(0, 1), run.v[layer, b, own].cpu())
            group = cache._groups[layer][b]
            assert group.index.build_seconds["repair"] > 0
            queries = run.q[layer, b, own].unflatten(1, (run.kv_heads, run.group)).permute(1, 2, 0, 3).contiguous()
            alone = cache.new_index()
            stored = group.tokens(cache._keys[layer]).flatten(0, 1)
            alone.build(stored, queries, torch.arange(length, device="cuda") - group.first)
            assert all(torch.equal(*both) for both in zip(built(alone), built(group.index), strict=True))
    assert cache.stats.seconds["repair"] > 0
    with torch.inference_mode():
        assert run.decode(cache).isfinite().all()


@pytest.mark.gpu
@GPU
def test_clusters_made_in_prefill_are_those_made_of_the_stored_states() -> None:
    run = Run([3000], device="cuda:0")
    cache = prefilled(run)
    run.prefill(cache)
    for layer, tail in enumerate(cache._tails):
        later = cache._tail_of_stored(layer)
        for name in ("centroids", "value_means", "log_sizes", "sizes", "assignment"):
            assert torch.equal(getattr(tail, name), getattr(later, name))


@pytest.mark.gpu
@GPU
def test_an_error_behind_the_gpu_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run([1000], device="cuda:0")
    cache = prefilled(run, estimation="none")

    def broken(*given: Any) -> int:
        raise RuntimeError("no repair")

    monkeypatch.setattr(_native, "repair", broken)
    with pytest.raises(RuntimeError, match="no repair"):
        run.prefill(cache)
