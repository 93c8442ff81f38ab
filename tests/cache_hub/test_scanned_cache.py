"""The flat strategy with its scan on the device, against the same strategy with the scan in CPU memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cache_run import LAYERS, Run, relative_error

from cache_hub import FlatCache, RunShape, check_fits, make_cache
from cache_hub.memory import required_bytes
from cache_hub.prefix import Manifest, fill_cache, read_manifest, write_prefix
from config import ConfigError, RetroInferConfig

pytest.importorskip("triton")
from cache_hub.scanned_cache import ScannedFlatCache

BATCH, STEPS = 3, 8
CUDA = torch.device("cuda:0")
COUNTERS = ("attended", "attended_of", "estimated", "scored", "scored_of", "bytes_moved")


@pytest.fixture(autouse=True)
def _on_any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter stands in for a GPU."""
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cpu":
        monkeypatch.setattr(ScannedFlatCache, "_check_use", staticmethod(lambda *_: None))


def settings(on_gpu: bool, **graph: Any) -> RetroInferConfig:
    graph = {"insert_batch": BATCH, "top_k": 10, **graph}
    return RetroInferConfig(
        retrieval_strategy="flat", flat={"on_gpu": on_gpu}, attention_aware_graph=graph, static_pattern_end=16
    )


def filled(run: Run, knobs: RetroInferConfig, together: int = 1, **common: Any) -> Any:
    cache = make_cache("flat", knobs, **run.common(**common))
    run.prefill(cache, together)
    return cache


def both(run: Run, together: int = 1, common: dict[str, Any] | None = None, **graph: Any) -> list[Any]:
    """Caches with the scan on the device, and in CPU memory."""
    return [filled(run, settings(on_gpu, **graph), together, **(common or {})) for on_gpu in (True, False)]


@pytest.mark.parametrize(
    ("lengths", "together", "graph"),
    [
        ([90], 1, {"estimation": "none"}),
        ([90], 1, {"estimation": "centroid", "insert_batch": 0}),
        ([131, 100], 1, {"estimation": "centroid"}),
        ([100, 100], 2, {"estimation": "centroid", "estimation_budget": 0.5}),
        ([97, 20, 120], 1, {"estimation": "none"}),
        ([20], 1, {"estimation": "centroid"}),
    ],
)
def test_retrieving_everything_is_what_the_scan_in_cpu_memory_does(
    device: str, lengths: list[int], together: int, graph: dict[str, Any]
) -> None:
    """While generated tokens enter the index; a prompt of 20 tokens stays static, alone or beside others."""
    run = Run(lengths, steps=STEPS, device=device)
    scanned, flat = both(run, together, top_k=150, **graph)
    assert isinstance(scanned, ScannedFlatCache)
    assert not any(scanned.needs_host(layer) for layer in range(LAYERS))
    out = run.decode(scanned)
    assert relative_error(out, run.decode(flat)) < 1e-5
    if graph.get("estimation_budget", 1) == 1:
        assert relative_error(out, run.full_attention()) < 1e-4
    for counter in COUNTERS:
        assert getattr(scanned.stats, counter) == getattr(flat.stats, counter), counter
    for groups in zip(scanned._groups, flat._groups, strict=True):
        assert [group.stop for group in groups[0]] == [group.stop for group in groups[1]]
    for layer, (ours, theirs) in enumerate(zip(scanned._tails, flat._tails, strict=True)):
        assert torch.equal(ours.assignment, theirs.assignment), layer
        if layer in scanned._scanned:
            there = scanned._scanned[layer].assignment.cpu()
            assert torch.equal(there[..., : ours.assignment.shape[2]], ours.assignment)


def test_nearly_all_that_is_wanted_is_found(device: str) -> None:
    """Recall of the top 20 by 8 bits, as `diagnose` counts it, and the mass with which they are as good."""
    run = Run([400, 300], steps=4, device=device)
    scanned, _ = both(run, common={"diagnose": True}, estimation="none", top_k=20)
    run.decode(scanned)
    agreement = scanned.stats.agreement
    assert agreement.mean(agreement.recall).mean() > 0.97
    torch.testing.assert_close(agreement.mass, agreement.exact_mass, rtol=0.02, atol=0)
    assert torch.equal(agreement.mean(agreement.scored)[0], torch.full((6,), (380 + 280) / 2 + BATCH / 4).double())


def test_a_rewound_cache_starts_again(device: str) -> None:
    run = Run([150, 97], steps=3, device=device)
    cache, _ = both(run, insert_batch=0)
    expected = run.decode(cache)
    counts = [getattr(cache.stats, counter) for counter in COUNTERS]
    assert all(counts)
    cache.rewind()
    assert cache.stats.attended == cache.stats.bytes_moved == 0
    assert torch.equal(run.decode(cache), expected)
    assert [getattr(cache.stats, counter) for counter in COUNTERS] == counts


def test_a_filled_cache_goes_over_to_other_settings(device: str) -> None:
    run = Run([150], steps=3, device=device)
    cache, _ = both(run, insert_batch=0, estimation="none")
    addresses = cache.captured(0)
    run.decode(cache)
    for graph in ({"top_k": 33, "estimation": "centroid"}, {"top_k": 5, "estimation": "centroid"}):
        knobs = settings(True, insert_batch=0, **graph)
        cache.rewind()
        cache.retune(knobs)
        assert cache.captured(0) != addresses
        addresses = cache.captured(0)
        assert torch.equal(run.decode(cache), run.decode(filled(run, knobs)))


def test_a_restored_cache_scans_what_the_saved_one_did(device: str, tmp_path: Path) -> None:
    """With an index that the scan in CPU memory saved, too: a prefix does not know who scans."""
    run = Run([200], steps=3, device=device)
    caches = both(run, insert_batch=0)
    expected = run.decode(caches[0])
    for number, cache in enumerate(caches):
        cache.rewind()
        given = {"model_name": "", "model": {}, "tokenizer": "", "built": {}, "settings": {}, "notes": {}}
        write_prefix(tmp_path / str(number), cache, {}, Manifest(strategy="flat", tokens=200, dtype="float32", **given))
        again = make_cache("flat", settings(True), **run.common())
        fill_cache(again, tmp_path / str(number), read_manifest(tmp_path / str(number)))
        assert relative_error(run.decode(again), expected) < 1e-4


def test_only_on_gpus() -> None:
    run = Run([90])
    with pytest.raises(
        ConfigError, match=r"flat\.on_gpu: got true for layers on cpu, allowed: true where all are on GPU"
    ):
        make_cache("flat", settings(True), **run.common())
    shape = RunShape((90,), 5, 6, 2, 64, 64, torch.float32, (torch.device("cpu"),))
    with pytest.raises(ConfigError, match="layers on cpu"):
        check_fits([("flat", settings(True))], shape)
    assert isinstance(make_cache("flat", settings(False), **run.common()), FlatCache)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"estimation": "softmax_lift"}, "estimation: got 'softmax_lift', allowed with flat.on_gpu: none, centroid"),
        ({"top_k": 1025}, "top_k: got 1025, allowed with flat.on_gpu: 1 to 1024"),
    ],
)
def test_what_a_scan_on_the_gpu_does_not_do(graph: dict[str, Any], message: str) -> None:
    shape = RunShape((300,), 5, 6, 2, 64, 64, torch.float32, (CUDA,))
    with pytest.raises(ConfigError, match=message):
        required_bytes([(ScannedFlatCache, settings(True, **graph))], shape)


def test_the_copy_is_counted_where_it_lies(device: str) -> None:
    run = Run([1000, 700], steps=STEPS, device=device)
    knobs = settings(True, estimation="none")
    cache = filled(run, knobs)
    shape = RunShape((1000, 700), STEPS, 6, 2, 64, 64, torch.float32, (torch.device(device),) * LAYERS)
    needs = [need for need in ScannedFlatCache.layer_needs(knobs, shape, CUDA) if need.what == "compact keys"]
    rings = sum(state.ring.nbytes for state in cache._scanned.values())
    assert [need.device for need in needs] == [CUDA]
    assert LAYERS * needs[0].nbytes == pytest.approx(cache.index_bytes + rings, rel=0.03)
