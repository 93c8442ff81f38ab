"""The estimate of memory: against what filled caches hold, and what is said where it will not do."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_run import LAYERS, Run

from cache_hub import STRATEGIES, RunShape, check_fits, make_cache, memory
from cache_hub.cluster_cache import ClusterCache
from cache_hub.memory import CPU, required_bytes
from config import RetroInferConfig, with_estimation

CUDA = torch.device("cuda:0")
VARIANTS = [
    "full",
    "wave_index",
    "flat+none",
    "flat+softmax_lift",
    "attention_aware_graph+none",
    "attention_aware_graph+centroid",
    "attention_aware_graph+softmax_lift",
    "ivf+none",
    "hnsw+centroid",
]
LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128, "hidden_size": 4096, "dtype": torch.bfloat16}


def shape_of(run: Run) -> RunShape:
    sizes = (run.group * run.kv_heads, run.kv_heads, run.dim, run.dim)
    return RunShape(tuple(run.lengths), run.steps, *sizes, torch.float32, (CPU,) * LAYERS)


def llama(length: int, layers: int = 32, batch: int = 1, new: int = 16, device: torch.device = CPU) -> RunShape:
    return RunShape((length,) * batch, new, **LLAMA, devices=(device,) * layers)


def needs(name: str, shape: RunShape, **settings) -> dict[torch.device, dict[str, int]]:
    strategy, knobs = with_estimation(name, RetroInferConfig(**settings))
    return required_bytes([(STRATEGIES[strategy], knobs)], shape)


@pytest.mark.parametrize("lengths", [[1800], [1500, 1800]])
@pytest.mark.parametrize("name", VARIANTS)
def test_agrees_with_what_a_filled_cache_holds(name: str, lengths: list[int]) -> None:
    """Within 3 %, for one prompt; of two unlike ones' clusters, it counts those of the longer, as the tables do."""
    run = Run(lengths)
    strategy, settings = with_estimation(name, RetroInferConfig())
    cache = make_cache(strategy, settings, **run.common())
    run.prefill(cache)
    cls = STRATEGIES[strategy]
    kept = [need for need in cls.layer_needs(settings, shape_of(run), CPU) if need.when != "build"]
    total = {what: LAYERS * sum(n.nbytes for n in kept if n.what == what) for what in {n.what for n in kept}}
    assert total.get("index", 0) + total.get("clusters", 0) == pytest.approx(cache.index_bytes, rel=0.03)
    zones = getattr(cache, "_zones", [])
    assert total.get("static tokens", 0) == sum(zone.keys.nbytes + zone.values.nbytes for zone in zones)
    if strategy == "wave_index":
        members = sum(sum(index.stored) for index in cache._indexes) * 2 * run.kv_heads * run.dim * 4
        assert total["keys and values"] == members
    else:
        assert total["keys and values"] == pytest.approx(cache.kv_bytes, rel=0.01)


def test_stores_are_as_large_as_allocated() -> None:
    run = Run([1500], steps=1100)
    shape = shape_of(run)
    for strategy in ("full", "wave_index", "attention_aware_graph"):
        cache = make_cache(strategy, RetroInferConfig(), **run.common())
        if strategy == "wave_index":
            stores = [states for index in cache._indexes for states in (index.keys, index.values)]
        else:
            stores = cache._keys + cache._values
        needed = needs(strategy, shape)[CPU]["keys and values"]
        assert needed == sum(store.nbytes for store in stores)


def test_a_grown_wave_index_has_the_clusters_that_were_counted() -> None:
    run = Run([1500], steps=1030)
    cache = make_cache("wave_index", RetroInferConfig(), **run.common())
    run.prefill(cache)
    assert needs("wave_index", shape_of(run))[CPU]["index"] == cache.index_bytes


@pytest.mark.parametrize("dtype", ["int8", "float16", "auto"])
def test_copies_of_keys_are_counted(dtype: str) -> None:
    run = Run([600])
    settings = RetroInferConfig(attention_aware_graph={"index_dtype": dtype, "estimation": "none"})
    cache = make_cache("attention_aware_graph", settings, **run.common())
    run.prefill(cache)
    needed = required_bytes([(STRATEGIES["attention_aware_graph"], settings)], shape_of(run))[CPU]
    assert needed["index"] == cache.index_bytes


def test_estimate_of_a_cluster_cache() -> None:
    run = Run([1800])
    cache = make_cache("wave_index", RetroInferConfig(), **run.common())
    run.prefill(cache)
    index = cache._indexes[0]
    pages = cache.cache_pages(index)
    made = ClusterCache(index, pages)
    sizes = (index.keys.shape[2], index.sizes.shape[2], pages, run.dim * 4)
    assert ClusterCache.expected_bytes(run.kv_heads, *sizes) == pytest.approx(made.nbytes, rel=0.01)


def test_a_prompt_too_short_to_index_needs_no_index() -> None:
    for strategy in ("flat", "attention_aware_graph", "wave_index"):
        assert not needs(strategy, llama(60))[CPU].keys() & {"index", "clusters", "a layer's build"}


def test_known_sizes_of_an_8b_model() -> None:
    """128 KiB a token: 64 GiB at 512K; links are an eighth of the keys and values, and clusters stand beside them."""
    table = needs("attention_aware_graph+none", llama(1 << 19))[CPU]
    assert table["keys and values"] == 64 << 30
    assert table["index"] == pytest.approx((64 << 30) / 8, rel=0.01)
    assert needs("full", llama(1 << 19, new=1))[CPU]["keys and values"] == (64 << 30) + (128 << 10)


def test_beside_a_gpu_stores_are_pinned_to_the_byte() -> None:
    """And as a whole, at the length of the longest prompt."""
    at, above = (needs("flat", llama(n, device=CUDA))[CPU]["keys and values"] for n in (1 << 17, (1 << 17) + 1))
    assert (at, above) == (32 * 2 << 28, (32 * 2 << 28) + (128 << 10))
    unlike = RunShape((1000, 10), 8, **LLAMA, devices=(CUDA,))
    assert needs("flat", unlike)[CPU]["keys and values"] == 2 * 2 * 1000 * 2048


def test_states_of_a_prompt_of_an_8b_model() -> None:
    """524,288 tokens: hidden, queries and output 4 GiB each, keys and values 1; in the MLP 1 GiB beside two of them,
    which is more only where the prompt is short."""
    long = replace(llama(1 << 19), mlp_size=14336, chunk=16384)
    assert memory.prompt_state_bytes(long) == (14 << 30, (8 << 30) + (1 << 30))
    assert memory.prompt_state_bytes(llama(1 << 19)) == (14 << 30, 8 << 30)
    short = replace(llama(1 << 10), mlp_size=14336, chunk=16384)
    while_built, in_mlp = memory.prompt_state_bytes(short)
    assert (while_built, in_mlp) == ((14 << 30) >> 9, (8 << 30 >> 9) + (1 << 26))
    assert in_mlp > while_built
    gpu = needs("full", replace(short, devices=(CUDA,)))[CUDA]
    assert gpu["the prompt's states in a layer"] == in_mlp


def test_where_things_are_beside_a_gpu() -> None:
    graph = needs("attention_aware_graph", llama(1 << 17, device=CUDA))
    assert graph[CPU].keys() == {"keys and values", "index", "clusters"}
    assert graph[CUDA].keys() >= {"static tokens", "the prompt's states in a layer"}
    here, there = (needs("attention_aware_graph+none", llama(1 << 17, device=device)) for device in (CPU, CUDA))
    keys = ((1 << 17) - 68) * 2048
    assert there[CUDA]["a layer's build"] == here[CPU]["a layer's build"] + keys
    assert needs("full", llama(1 << 17, device=CUDA)).keys() == {CUDA}
    assert needs("wave_index", llama(1 << 17, device=CUDA), gpu_only=True).keys() == {CUDA}
    members = needs("wave_index", llama(1 << 17, device=CUDA))[CPU]
    assert members.keys() == {"keys and values"}


@pytest.mark.parametrize("name", ["flat+none", "attention_aware_graph+centroid", "ivf+none", "hnsw+none"])
def test_a_store_on_the_gpu_is_counted_there_and_its_keys_in_cpu_memory_too(name: str) -> None:
    shape = llama(1 << 17, batch=2, device=CUDA)
    pinned, there = (needs(name, shape, gpu_only=gpu_only) for gpu_only in (False, True))
    store = pinned[CPU].pop("keys and values")
    assert store == 2 * 32 * 2 << 28
    assert there[CUDA].pop("keys and values") == store
    assert there[CPU].pop("keys to search") == store // 2
    assert there == pinned
    here = llama(1 << 17, batch=2)
    assert needs(name, here, gpu_only=True) == needs(name, here)


def test_a_scan_on_the_gpu_needs_no_keys_in_cpu_memory() -> None:
    pytest.importorskip("triton")
    from cache_hub.scanned_cache import ScannedFlatCache

    knobs = RetroInferConfig(gpu_only=True, flat={"on_gpu": True}, attention_aware_graph={"estimation": "none"})
    table = required_bytes([(ScannedFlatCache, knobs)], llama(1 << 17, device=CUDA))
    assert table[CUDA]["keys and values"] == 32 * 2 << 28
    assert not sum(table[CPU].values())


def test_a_gpu_too_small_for_the_store_is_named(monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 80e9 if device == CUDA else 1e12)
    settings = RetroInferConfig(gpu_only=True)
    check_fits([("flat", settings)], llama(1 << 18, device=CUDA))
    message = r"flat with .*: needs 90\.7 GB of GPU \(cuda:0\) memory \(keys and values 68\.7 GB, .*\), 80\.0 GB are av"
    with pytest.raises(ValueError, match=message):
        check_fits([("flat", settings)], llama(1 << 19, device=CUDA))
    check_fits([("flat", RetroInferConfig())], llama(1 << 19, device=CUDA))


def test_layers_of_two_gpus_are_counted_where_they_are() -> None:
    both = RunShape((1000,), 8, **LLAMA, devices=(CUDA, CUDA, torch.device("cuda:1")))
    table = needs("full", both)
    assert table[CUDA]["keys and values"] == 2 * table[torch.device("cuda:1")]["keys and values"]


def test_caches_of_one_prefill_add_up_but_their_temporaries() -> None:
    strategy, settings = with_estimation("attention_aware_graph+none", RetroInferConfig())
    one, two = (required_bytes([(STRATEGIES[strategy], settings)] * times, llama(1 << 15))[CPU] for times in (1, 2))
    for what, nbytes in one.items():
        assert two[what] == nbytes * (1 if what in ("a layer's build", "the prompt's states in a layer") else 2)


@pytest.mark.parametrize("lengths", [(1 << 19,), (1 << 19, 1 << 19), (1 << 19, 50)])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_largest_context_is_the_largest(name: str, lengths: tuple[int, ...], monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 20e9)
    strategy, settings = with_estimation(name, RetroInferConfig())
    shape = RunShape(lengths, 16, **LLAMA, devices=(CPU,) * 32)
    with pytest.raises(ValueError, match="the largest context that fits is a prompt of") as caught:
        check_fits([(strategy, settings)], shape)
    fits = int(re.search(r"a prompt of ([\d,]+) tokens$", str(caught.value))[1].replace(",", ""))
    assert 1000 < fits < 1 << 18
    check_fits([(strategy, settings)], shape.cut(fits))
    with pytest.raises(ValueError, match="largest context"):
        check_fits([(strategy, settings)], shape.cut(fits + 1))


def test_message(monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 23.1e9)
    settings = RetroInferConfig()
    expected = (
        r"^full and flat with a prompt of 524,288 tokens and 16 new ones, x 1: needs 1[56]\d\.\d GB of CPU memory "
        r"\(keys and values 137\.4 GB, .*\), 23\.1 GB are available; the largest context that fits is a prompt of "
    )
    with pytest.raises(ValueError, match=expected):
        check_fits([("full", settings), ("flat", settings)], llama(1 << 19))


def test_every_place_that_is_short_is_named(monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1e6)
    with pytest.raises(ValueError, match=r"of CPU memory .* of GPU \(cuda:0\) memory .*; no prompt fits$"):
        check_fits([("flat", RetroInferConfig())], llama(1 << 17, device=CUDA))


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(ValueError, match="retrieval_strategy: got 'annoy', allowed: full"):
        check_fits([("annoy", RetroInferConfig())], llama(100))


def test_available_memory_is_between_nothing_and_all_there_is() -> None:
    assert 0 < memory.available_bytes(CPU) < 1 << 50


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """Of both versions, those of the groups above too; caches of files count as free."""
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    write(tmp_path / "outer" / "inner", memory__max="max\n", memory__current="10\n")
    write(tmp_path / "outer", memory__max="1000\n", memory__current="400\n", memory__stat="inactive_file 50\nanon 7\n")
    assert memory._left_by_cgroups(membership, tmp_path) == [650]
    membership.write_text("4:cpu,memory:/elsewhere\n3:cpuset:/\n")
    write(tmp_path / "memory", memory__limit_in_bytes="900\n", memory__usage_in_bytes="300\n")
    assert memory._left_by_cgroups(membership, tmp_path) == [600]


def test_memory_of_the_machine(tmp_path: Path) -> None:
    write(tmp_path, meminfo="MemTotal: 9 kB\nMemAvailable:    7 kB\n")
    assert memory._mem_available(tmp_path / "meminfo") == 7 * 1024
    assert memory._mem_available(tmp_path / "none") == float("inf")


def test_memory_that_torch_holds_without_use_is_available(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 999))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    assert memory.available_bytes(CUDA) == 120
    stats = {"allocated_bytes.current": 1 << 60, "active_bytes.current": 1 << 59}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: stats, raising=False)
    assert memory.available_bytes(CPU) > 1 << 59


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gpu_only", [False, True])
@pytest.mark.parametrize("name", ["full", "flat+none", "wave_index"])
def test_agrees_with_what_a_gpu_and_pinned_memory_hold(name: str, gpu_only: bool) -> None:
    """Of 2,024 tokens, which is no power of two. On the GPU no less is held than was counted."""
    run = Run([2024], device="cuda:0")
    strategy, settings = with_estimation(name, RetroInferConfig(gpu_only=gpu_only))
    layers = STRATEGIES[strategy].layer_needs(settings, replace(shape_of(run), devices=(CUDA,) * LAYERS), CUDA)
    stored = ("keys and values", "keys to search")
    pinned = sum(need.nbytes for need in layers if need.device == CPU and need.what in stored) * LAYERS
    there = sum(need.nbytes for need in layers if need.device == CUDA and need.when != "build") * LAYERS
    on_gpu = torch.cuda.memory_allocated()
    cache = make_cache(strategy, settings, **run.common())
    indexes = getattr(cache, "_indexes", [])
    stores = [x for index in indexes for x in (index.keys, index.values)] or [*cache._keys, *cache._values]
    stores += getattr(cache, "_key_copies", {}).values()
    assert sum(store.nbytes for store in stores if store.is_pinned()) == pinned
    run.prefill(cache)
    assert torch.cuda.memory_allocated() - on_gpu >= 0.99 * there
