"""The flat strategy with a scan of chosen clusters on the device, against the scan of all keys there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cache_run import LAYERS, Run, relative_error

from cache_hub import RunShape, make_cache, settle
from cache_hub.memory import required_bytes
from cache_hub.prefix import Manifest, fill_cache, read_manifest, write_prefix
from config import ConfigError, RetroInferConfig

pytest.importorskip("triton")
from cache_hub.index.clustered_keys import ALL
from cache_hub.pruned_cache import PrunedFlatCache
from cache_hub.scanned_cache import ScannedFlatCache

BATCH, STEPS = 3, 8
CUDA = torch.device("cuda:0")
COUNTERS = ("attended", "attended_of", "estimated", "scored_of", "bytes_moved")


@pytest.fixture(autouse=True)
def _on_any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter stands in for a GPU."""
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cpu":
        monkeypatch.setattr(ScannedFlatCache, "_check_use", staticmethod(lambda *_: None))


def settings(share: float, **graph: Any) -> RetroInferConfig:
    graph = {"insert_batch": BATCH, "top_k": 10, **graph}
    flat = {"on_gpu": True, "scan_share": share}
    return RetroInferConfig(retrieval_strategy="flat", flat=flat, attention_aware_graph=graph, static_pattern_end=16)


def filled(run: Run, knobs: RetroInferConfig, together: int = 1, **common: Any) -> Any:
    cache = make_cache("flat", knobs, **run.common(**common))
    run.prefill(cache, together)
    return cache


def in_token_order(cache: Any, layer: int, table: torch.Tensor) -> torch.Tensor:
    """What lies in the order of the clusters, [B, Hkv, N, ..], by tokens."""
    keys = cache._scanned[layer].keys
    out = torch.zeros_like(table)
    for b, count in enumerate(keys.counts):
        for head in range(table.shape[1]):
            own = keys.tokens[b, head, :count].long()
            assert torch.equal(own.sort().values, torch.arange(count, device=own.device))
            out[b, head, own] = table[b, head, :count]
    return out


@pytest.mark.parametrize(
    ("lengths", "together", "graph"),
    [
        ([90], 1, {"insert_batch": 0}),
        ([131, 100], 1, {}),
        ([100, 100], 2, {"estimation_budget": 0.5}),
        ([97, 20, 120], 1, {}),
        ([20], 1, {}),
    ],
)
def test_scanning_all_clusters_is_scanning_all_keys(
    device: str, lengths: list[int], together: int, graph: dict[str, Any]
) -> None:
    """While generated tokens enter the index; a prompt of 20 tokens stays static, alone or beside others."""
    run, graph = Run(lengths, steps=STEPS, device=device), {"top_k": 13, **graph}
    pruned, whole = (filled(run, settings(share, **graph), together) for share in (0.5, 1.0))
    assert isinstance(pruned, PrunedFlatCache)
    assert not isinstance(whole, PrunedFlatCache)
    for layer, state in pruned._scanned.items():  # so few clusters that top_k of them are all
        assert state.keys.wanted[:, 0].tolist() == [ALL] * len(lengths), layer
    assert relative_error(run.decode(pruned), run.decode(whole)) < 1e-5
    for counter in COUNTERS:
        assert getattr(pruned.stats, counter) == getattr(whole.stats, counter), counter
    for layer, state in pruned._scanned.items():
        keys, plain = state.keys, whole._scanned[layer].keys
        assert keys.counts == plain.counts
        assert torch.equal(in_token_order(pruned, layer, keys.codes), plain.codes)
        assert torch.equal(in_token_order(pruned, layer, keys.scales), plain.scales)


def test_a_share_of_the_clusters_is_scanned_and_counted(device: str) -> None:
    """While tokens enter the index: the counters, and what a diagnosis says. That recall, of random keys, is what a
    topk over the same centroids gave for the first step."""
    run = Run([1200, 900], steps=STEPS, device=device)
    graph = {"top_k": 4, "estimation_budget": 0.7}
    pruned, whole = (filled(run, settings(share, **graph), diagnose=True) for share in (0.2, 1.0))
    for cache in (pruned, whole):
        run.decode(cache)
    ours, theirs = pruned.stats, whole.stats
    mean, full = (float(stats.agreement.mean(stats.agreement.recall).mean()) for stats in (ours, theirs))
    assert full > 0.95
    assert mean == pytest.approx(0.7, abs=0.05)
    assert float(ours.agreement.scored.sum() / theirs.agreement.scored.sum()) == pytest.approx(0.35, abs=0.05)
    centroids = 0
    for layer in range(LAYERS):
        # One cluster more a sequence with each batch, of which the last begin to count in the step behind theirs.
        first = [keys // 10 for keys in (1180, 880)]
        assert pruned._scanned[layer].keys.clustered == [number + pruned._latest[layer].batches for number in first]
        begun = [0 if step < BATCH + layer else (step - layer) // BATCH for step in range(STEPS)]
        centroids += sum(sum(first) + 2 * grown for grown in begun) * 6
    assert ours.scored == int(ours.agreement.scored.sum()) + 2 * centroids
    assert ours.scored_bytes == int(ours.agreement.scored.sum()) * 68 + 2 * centroids * 64 * 4


def test_a_rewound_cache_starts_again(device: str) -> None:
    run = Run([250, 197], steps=3, device=device)
    cache = filled(run, settings(0.2, insert_batch=0, top_k=3))
    expected = run.decode(cache)
    counts = [getattr(cache.stats, counter) for counter in (*COUNTERS, "scored", "scored_bytes")]
    assert all(counts)
    cache.rewind()
    assert cache.stats.attended == cache.stats.scored == cache.stats.scored_bytes == 0
    assert torch.equal(run.decode(cache), expected)
    assert [getattr(cache.stats, counter) for counter in (*COUNTERS, "scored", "scored_bytes")] == counts


def test_a_filled_cache_goes_over_to_other_settings(device: str) -> None:
    run = Run([250], steps=3, device=device)
    cache = filled(run, settings(0.2, insert_batch=0, top_k=3))
    run.decode(cache)
    for top_k in (8, 2):
        knobs = settings(0.2, insert_batch=0, top_k=top_k)
        cache.rewind()
        cache.retune(knobs)
        assert torch.equal(run.decode(cache), run.decode(filled(run, knobs)))


def test_a_restored_cache_scans_what_the_saved_one_did(device: str, tmp_path: Path) -> None:
    """Of a prefix that a scan of all keys saved, too."""
    run = Run([300], steps=3, device=device)
    pruned, whole = (filled(run, settings(share, insert_batch=0, top_k=3)) for share in (0.2, 1.0))
    expected = run.decode(pruned)
    for number, cache in enumerate((pruned, whole)):
        cache.rewind()
        given = {"model_name": "", "model": {}, "tokenizer": "", "built": {}, "settings": {}, "notes": {}}
        write_prefix(tmp_path / str(number), cache, {}, Manifest(strategy="flat", tokens=300, dtype="float32", **given))
        again = make_cache("flat", settings(0.2, top_k=3), **run.common())
        fill_cache(again, tmp_path / str(number), read_manifest(tmp_path / str(number)))
        assert relative_error(run.decode(again), expected) < 1e-4


def test_clusters_are_what_is_scanned() -> None:
    shape = RunShape((300,), 5, 6, 2, 64, 64, torch.float32, (CUDA,))
    message = "estimation: got 'none', allowed with flat.scan_share below 1: centroid"
    with pytest.raises(ConfigError, match=message):
        required_bytes([(PrunedFlatCache, settings(0.5, estimation="none"))], shape)


@pytest.mark.parametrize("estimation", ["none", "centroid"])
def test_auto_scans_clusters_where_there_are_any(estimation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache_hub.fits", lambda *_: True)
    shape = RunShape((300,), 5, 6, 2, 64, 64, torch.float32, (CUDA,))
    ((strategy, settled),) = settle([("auto", settings(0.5, estimation=estimation))], shape)
    assert strategy == ("flat" if estimation == "centroid" else "attention_aware_graph")
    assert settled.flat.scan_share == 0.5


def test_the_order_is_counted_where_it_lies(device: str) -> None:
    run = Run([1000, 700], steps=STEPS, device=device)
    cache = filled(run, settings(0.2))
    shape = RunShape((1000, 700), STEPS, 6, 2, 64, 64, torch.float32, (torch.device(device),) * LAYERS)
    needs = {need.what: need for need in PrunedFlatCache.layer_needs(settings(0.2), shape, CUDA)}
    assert needs["order of the compact keys"].device == CUDA
    expected = needs["compact keys"].nbytes + needs["order of the compact keys"].nbytes
    rings = sum(state.ring.nbytes for state in cache._scanned.values())
    tails = sum(tail.nbytes for tail in cache._tails)
    assert LAYERS * expected == pytest.approx(cache.index_bytes + rings - tails, rel=0.01)
