"""Keys and values where the layer computes: the same output, of a store that nothing but its place tells apart."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_run import LAYERS, Run, relative_error

from cache_hub import growing_layers, make_cache
from cache_hub.growing_layers import GrowingLayers
from cache_hub.index import AttentionAwareGraphIndex, FlatIndex, make_index
from cache_hub.prefix import Manifest, fill_cache, read_manifest, write_prefix
from config import ESTIMATIONS, RetroInferConfig

INDEXED = ["flat", "attention_aware_graph", "ivf", "hnsw"]
BATCH, STEPS = 7, 20
COUNTERS = ("attended", "attended_of", "estimated", "scored", "scored_bytes", "scored_of")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def filled(strategy: str, run: Run, gpu_only: bool, on_gpu: bool = False, together: int = 1, **graph: Any) -> Any:
    small = {"key_degree": 8, "key_links": 4, "top_k": 20, "index_dtype": "auto", "insert_batch": BATCH, **graph}
    settings = RetroInferConfig(
        gpu_only=gpu_only, flat={"on_gpu": on_gpu}, attention_aware_graph=small, static_pattern_end=16
    )
    cache = make_cache(strategy, settings, **run.common(prefill_bsz=together, diagnose=True))
    run.prefill(cache, together)
    return cache


def assert_same_work(ours: Any, theirs: Any) -> None:
    """Recall and mass too."""
    for counter in COUNTERS:
        assert getattr(ours.stats, counter) == getattr(theirs.stats, counter), counter
    for sums in ("recall", "mass", "scored"):
        pair = (getattr(cache.stats.agreement, sums) for cache in (ours, theirs))
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def assert_copies(cache: Any) -> None:
    """Of all keys indexed; and the indexes that refer to keys refer to them."""
    for layer, groups in enumerate(cache._groups):
        for group in groups:
            copy, stored = (group.tokens(keys[layer]) for keys in (cache._key_copies, cache._keys))
            assert torch.equal(copy, stored.cpu())
            if isinstance(group.index, (FlatIndex, AttentionAwareGraphIndex)):
                assert group.index.keys.data_ptr() == copy.data_ptr()


@pytest.fixture
def _keys_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for a GPU, which has the store, while what searches refers to a copy of the keys."""
    apart = classmethod(lambda cls, gpu_only, device: cls.searches_on_host and gpu_only)
    monkeypatch.setattr(GrowingLayers, "copies_keys", apart)
    monkeypatch.setattr(growing_layers, "copying", lambda device, *sources: nullcontext())


@pytest.mark.parametrize("strategy", INDEXED)
def test_on_a_cpu_it_changes_nothing(strategy: str) -> None:
    run = Run([300, 131], steps=STEPS)
    ours, theirs = (filled(strategy, run, gpu_only) for gpu_only in (True, False))
    assert not ours._key_copies
    assert torch.equal(run.decode(ours), run.decode(theirs))
    assert_same_work(ours, theirs)
    assert ours.stats.bytes_moved == theirs.stats.bytes_moved > 0
    assert (ours.kv_bytes, ours.index_bytes) == (theirs.kv_bytes, theirs.index_bytes)


@pytest.mark.usefixtures("_keys_apart")
@pytest.mark.parametrize("estimation", ESTIMATIONS)
@pytest.mark.parametrize(("lengths", "together"), [([300, 131], 1), ([257, 20, 200], 1), ([150, 150], 2)])
@pytest.mark.parametrize("strategy", INDEXED)
def test_what_searches_a_copy_of_the_keys_finds_the_same(
    strategy: str, lengths: list[int], together: int, estimation: str
) -> None:
    """While generated tokens enter store, copy and index."""
    run = Run(lengths, steps=STEPS)
    ours, theirs = (
        filled(strategy, run, gpu_only, False, together, estimation=estimation) for gpu_only in (True, False)
    )
    assert_copies(ours)
    assert torch.equal(run.decode(ours), run.decode(theirs))
    assert_same_work(ours, theirs)
    assert all(group.stop > run.lengths[group.start] - 16 for groups in ours._groups for group in groups), "they grew"
    assert_copies(ours)
    assert ours.index_bytes == theirs.index_bytes + sum(copy.nbytes for copy in ours._key_copies.values())
    assert ours.kv_bytes == theirs.kv_bytes


@pytest.mark.usefixtures("_keys_apart")
def test_attention_reads_the_store_and_not_the_copy() -> None:
    run = Run([200])
    cache = filled("flat", run, True, top_k=200, insert_batch=0)
    for copy in cache._key_copies.values():
        copy.zero_()
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5


@pytest.mark.usefixtures("_keys_apart")
@pytest.mark.parametrize("estimation", ESTIMATIONS)
@pytest.mark.parametrize("strategy", INDEXED)
def test_a_prefix_does_not_know_where_its_store_lay(strategy: str, estimation: str, tmp_path: Path) -> None:
    run = Run([200], dim=16)
    told: dict[str, Any] = {"model_name": "", "model": {}, "tokenizer": "", "built": {}, "settings": {}, "notes": {}}
    for saved_with in (True, False):
        cache, folder = filled(strategy, run, saved_with, estimation=estimation), tmp_path / str(saved_with)
        write_prefix(folder, cache, {}, Manifest(strategy=strategy, tokens=200, dtype="float32", **told))
        expected = run.decode(cache)
        for gpu_only in (True, False):
            graph = {"key_degree": 8, "key_links": 4, "top_k": 20, "index_dtype": "auto", "estimation": estimation}
            knobs = RetroInferConfig(gpu_only=gpu_only, attention_aware_graph=graph, static_pattern_end=16)
            again: Any = make_cache(strategy, knobs, **run.common())
            fill_cache(again, folder, read_manifest(folder))
            assert torch.equal(run.decode(again), expected)
            assert len(again._key_copies) == LAYERS * gpu_only
            again.rewind()
            assert torch.equal(run.decode(again), expected)


def test_caches_with_stores_elsewhere_are_not_shared() -> None:
    run = Run([200])
    cache = type(filled("flat", run, False))
    assert cache.build_key(RetroInferConfig(gpu_only=True)) != cache.build_key(RetroInferConfig())


def test_an_exact_index_over_keys_that_the_cpu_cannot_read_is_not_searched() -> None:
    index, keys = make_index("flat"), torch.empty(2, 90, 64, device="meta")
    index.build(keys[:, :80], keys[:, None, :0])
    index.insert(keys)
    assert index.nbytes == 0
    with pytest.raises(ValueError, match=r"rows: got torch\.float32 on meta .*, allowed: .* in CPU memory"):
        index.search(torch.ones(2, 3, 64), 5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("lengths", "together"), [([700], 1), ([700, 300], 1), ([257, 20, 200], 1), ([300, 300], 2)])
@pytest.mark.parametrize(
    ("strategy", "on_gpu", "graph"),
    [
        *(("attention_aware_graph", False, {"estimation": estimation}) for estimation in ESTIMATIONS),
        ("attention_aware_graph", False, {"estimation": "centroid", "insert_batch": 0}),
        ("attention_aware_graph", False, {"estimation": "centroid", "index_dtype": "int8"}),
        *(("flat", False, {"estimation": estimation}) for estimation in ESTIMATIONS),
        ("flat", True, {"estimation": "none"}),
        ("flat", True, {"estimation": "centroid"}),
        ("flat", True, {"estimation": "centroid", "insert_batch": 0}),
        ("ivf", False, {"estimation": "none"}),
        ("hnsw", False, {"estimation": "none"}),
    ],
)
@torch.inference_mode()
def test_a_store_on_the_gpu_gives_what_one_in_pinned_memory_does(
    strategy: str, on_gpu: bool, graph: dict[str, Any], lengths: list[int], together: int
) -> None:
    """While generated tokens enter the index, and behind a rewind where none do."""
    run = Run(lengths, steps=STEPS, device="cuda:0")
    ours, theirs = (filled(strategy, run, gpu_only, on_gpu, together, **graph) for gpu_only in (True, False))
    assert relative_error(run.decode(ours), run.decode(theirs)) < 1e-4
    if graph.get("insert_batch") == 0:
        for cache in (ours, theirs):
            cache.rewind()
        assert relative_error(run.decode(ours), run.decode(theirs)) < 1e-4
    assert_same_work(ours, theirs)
    assert theirs.stats.bytes_moved > ours.stats.bytes_moved == 0
    for layer, groups in enumerate(ours._groups):
        for keys, store in ((run.k, ours._keys[layer]), (run.v, ours._values[layer])):
            assert store.is_cuda
            for group in groups:
                given = keys[layer, group.start, run.pads[group.start] :].transpose(0, 1)
                assert torch.equal(store[group.start, :, : group.stop], given[:, : group.stop])
    if not on_gpu:
        assert_copies(ours)
    copies = sum(copy.nbytes for copy in ours._key_copies.values())
    assert (copies == 0) == on_gpu
    assert ours.index_bytes == theirs.index_bytes + copies


@pytest.mark.gpu
@needs_gpu
def test_a_scanned_store_on_the_gpu_is_saved_and_restored(tmp_path: Path) -> None:
    run = Run([300], device="cuda:0")
    told: dict[str, Any] = {"model_name": "", "model": {}, "tokenizer": "", "built": {}, "settings": {}, "notes": {}}
    knobs = RetroInferConfig(gpu_only=True, flat={"on_gpu": True}, attention_aware_graph={"top_k": 20})
    caches: list[Any] = [make_cache("flat", knobs, **run.common()) for _ in range(2)]
    run.prefill(caches[0])
    write_prefix(tmp_path / "prefix", caches[0], {}, Manifest(strategy="flat", tokens=300, dtype="float32", **told))
    fill_cache(caches[1], tmp_path / "prefix", read_manifest(tmp_path / "prefix"))
    assert all(store.is_cuda for store in (*caches[1]._keys, *caches[1]._values))
    assert relative_error(run.decode(caches[1]), run.decode(caches[0])) < 1e-4


@pytest.mark.gpu
@needs_gpu
def test_clusters_are_made_later_of_a_store_on_the_gpu() -> None:
    run = Run([700, 300], device="cuda:0")
    late, early = (filled("flat", run, True, insert_batch=0, estimation=name) for name in ("none", "centroid"))
    graph = {"key_degree": 8, "key_links": 4, "top_k": 20, "index_dtype": "auto", "insert_batch": 0}
    late.retune(RetroInferConfig(gpu_only=True, attention_aware_graph={**graph, "estimation": "centroid"}))
    assert relative_error(run.decode(late), run.decode(early)) < 1e-4
