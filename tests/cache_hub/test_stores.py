"""The stores of prompt and indexed tokens: a token's key and value side by side, and read where they lie."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cache_run import LAYERS, Run

from cache_hub import KV_Cache, make_cache, retrieval_cache
from cache_hub.growing_layers import GrowingLayers
from cache_hub.prefix import Manifest, fill_cache, read_manifest, write_prefix
from config import RetroInferConfig

INDEXED = ["flat", "attention_aware_graph", "ivf", "hnsw"]


def empty(strategy: str, run: Run, **graph: Any) -> KV_Cache:
    small = {"key_degree": 8, "key_links": 4, "num_entries": 6, "top_k": 10, "ef_search": 20, **graph}
    return make_cache(strategy, RetroInferConfig(attention_aware_graph=small), **run.common())


def filled(strategy: str, run: Run, **graph: Any) -> Any:
    cache = empty(strategy, run, **graph)
    run.prefill(cache)
    return cache


@pytest.mark.parametrize("steps", [5, 24])
@pytest.mark.parametrize("strategy", INDEXED)
def test_key_and_value_of_a_token_are_one_piece(strategy: str, steps: int) -> None:
    """And both are what was given, those of tokens that came into the index while decoding too."""
    run = Run([301, 301], dim=16, steps=steps)
    cache = filled(strategy, run, insert_batch=8)
    run.decode(cache)
    for layer, (keys, values) in enumerate(zip(cache._keys, cache._values, strict=True)):
        assert keys.shape == values.shape == (2, 2, keys.shape[2], 16)
        assert values.data_ptr() - keys.data_ptr() == 16 * keys.itemsize
        assert keys.stride() == values.stride()
        assert keys.stride(2) == 2 * 16
        held = cache._groups[layer][0].stop
        assert held == 301 - 64 + 8 * cache._latest[layer].batches
        assert held > 301 - 64 or steps == 5
        held = max(held, 301)
        assert torch.equal(keys[:, :, :held], run.k[layer, :, :held].transpose(1, 2))
        assert torch.equal(values[:, :, :held], run.v[layer, :, :held].transpose(1, 2))


@pytest.mark.parametrize("strategy", ["flat", "attention_aware_graph"])
def test_indexes_and_clusters_read_the_store_itself(strategy: str) -> None:
    run = Run([301, 301], dim=16)
    cache = filled(strategy, run, index_dtype="auto")
    run.decode(cache)
    for layer in range(LAYERS):
        for b, group in enumerate(cache._groups[layer]):
            for store in (cache._keys[layer], cache._values[layer]):
                assert group.tokens(store).flatten(0, 1).data_ptr() == store[b, :, 4:].data_ptr(), "a view"
            assert group.index.keys.data_ptr() == cache._keys[layer][b, :, 4:].data_ptr()


def test_a_whole_batch_in_one_prefill_is_a_view_too() -> None:
    run = Run([301, 301], dim=16)
    settings = RetroInferConfig(attention_aware_graph={"key_degree": 8, "key_links": 4, "index_dtype": "auto"})
    cache: Any = make_cache("attention_aware_graph", settings, **run.common(prefill_bsz=2))
    run.prefill(cache, together=2)
    (group,) = cache._groups[0]
    assert group.index.keys.shape[0] == 4
    assert group.index.keys.data_ptr() == cache._keys[0][:, :, 4:].data_ptr()


def test_what_is_written_beside_other_stores_is_read_back(tmp_path: Path) -> None:
    """A file's keys and values lie apart; the digest of an index is that of its keys, wherever they lie."""
    run = Run([301], dim=16)
    cache = filled("attention_aware_graph", run, insert_batch=0)
    told: dict[str, Any] = {"model_name": "", "model": {}, "tokenizer": "", "built": {}, "settings": {}, "notes": {}}
    manifest = Manifest(strategy="attention_aware_graph", tokens=301, dtype="float32", **told)
    write_prefix(tmp_path / "prefix", cache, {}, manifest)
    again = empty("attention_aware_graph", run, insert_batch=0)
    fill_cache(again, tmp_path / "prefix", read_manifest(tmp_path / "prefix"))
    apart: Any = again
    assert apart._keys[0].is_contiguous()
    assert apart._values[0].is_contiguous()
    assert torch.equal(run.decode(again), run.decode(cache))


@pytest.mark.parametrize(("core", "cpus", "used"), [(22, 5, 5), (3, 5, 3), (5, 5, 5)])
def test_no_more_threads_than_cpus(core: int, cpus: int, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_cache, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(GrowingLayers, "_allocate", lambda self: None)
    on_gpu = Run([301], dim=16).common(layer_mapping={"0": "cuda:0", "1": "cuda:0"})
    cache: Any = make_cache("flat", RetroInferConfig(core=core), **on_gpu)
    assert cache.num_threads == cache.new_index().num_threads == used
    told = [note for note in cache.stats.notes if note.startswith("core:")]
    assert told == ([f"core: {core} threads were asked for, {used} are used, one for each CPU"] if core > cpus else [])


def test_on_the_cpu_threads_are_torchs() -> None:
    cache: Any = make_cache("flat", RetroInferConfig(core=1), **Run([301], dim=16).common())
    assert cache.num_threads is None
    assert not cache.stats.notes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strategy", ["flat", "attention_aware_graph"])
def test_beside_a_gpu_the_store_is_pinned_and_holds_what_was_given(strategy: str) -> None:
    run = Run([1201, 901], dim=64, steps=24, device="cuda")
    cache = filled(strategy, run, insert_batch=8)
    run.decode(cache)
    check_stores(cache, run)


def check_stores(cache: KV_Cache, run: Run) -> None:
    stores: Any = cache
    for layer in range(LAYERS):
        for given, store in ((run.k, stores._keys[layer]), (run.v, stores._values[layer])):
            assert store.is_pinned()
            for b, group in enumerate(stores._groups[layer]):
                states = given[layer, b, run.pads[b] :].transpose(0, 1).cpu()
                assert torch.equal(store[b, :, : group.stop], states[:, : group.stop])
