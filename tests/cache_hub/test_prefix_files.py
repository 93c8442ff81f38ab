"""Saved caches: decoding goes on as if the prompt had been read, and a folder is whole, or refused, or not there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_run import LAYERS, Run
from saved_files import damage, mapped_files, replace_tensor, same, seal, seal_manifest

from cache_hub import STRATEGIES, KV_Cache, make_cache
from cache_hub.index.tensor_file import open_tensors
from cache_hub.prefix import Manifest, check_files, check_free, fill_cache, read_head, read_manifest, write_prefix
from config import ESTIMATIONS, RetroInferConfig

SAVED = [name for name, cache in STRATEGIES.items() if cache.built_settings(RetroInferConfig()) is not None]
TOKENS = 300
DIM = 16


def settings(strategy: str, estimation: str = "centroid", **graph: Any) -> RetroInferConfig:
    small = {"key_degree": 8, "key_links": 4, "num_entries": 6, "top_k": 10, "ef_search": 20, **graph}
    return RetroInferConfig(retrieval_strategy=strategy, attention_aware_graph={**small, "estimation": estimation})


def manifest(strategy: str, tokens: int = TOKENS, **changes: Any) -> Manifest:
    given = {"model_name": "", "model": {}, "tokenizer": "", "built": {}, "settings": {}, "notes": {}, **changes}
    return Manifest(strategy=strategy, tokens=tokens, dtype="float32", **given)


def prefilled(
    strategy: str, estimation: str = "centroid", lengths: tuple[int, ...] = (TOKENS,)
) -> tuple[Run, KV_Cache]:
    run = Run(list(lengths), dim=DIM)
    cache = make_cache(strategy, settings(strategy, estimation), **run.common())
    run.prefill(cache)
    return run, cache


def loaded(folder: Path, run: Run, strategy: str, estimation: str = "centroid") -> KV_Cache:
    found = read_manifest(folder)
    check_files(folder, found)
    cache = make_cache(strategy, settings(strategy, estimation), **run.common())
    fill_cache(cache, folder, found)
    return cache


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Run, torch.Tensor, Path]:
    """A graph's prefix with clusters: its run, what decoding gives, and the folder."""
    run, cache = prefilled("attention_aware_graph")
    write_prefix(tmp_path / "prefix", cache, {}, manifest("attention_aware_graph"))
    return run, run.decode(cache), tmp_path / "prefix"


@pytest.mark.parametrize("estimation", ESTIMATIONS)
@pytest.mark.parametrize("strategy", SAVED)
def test_decoding_goes_on_bit_for_bit(strategy: str, estimation: str, tmp_path: Path) -> None:
    run, cache = prefilled(strategy, estimation)
    write_prefix(tmp_path / "prefix", cache, {"x": torch.ones(2)}, manifest(strategy))
    assert same(read_head(tmp_path / "prefix")["x"], torch.ones(2))
    again = loaded(tmp_path / "prefix", run, strategy, estimation)
    assert (again.index_bytes, again.kv_bytes) == (cache.index_bytes, cache.kv_bytes)
    expected = run.decode(cache)
    assert same(run.decode(again), expected)
    again.rewind()
    assert same(run.decode(again), expected)
    assert again.stats.attended == cache.stats.attended


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("estimation", ESTIMATIONS)
@pytest.mark.parametrize("strategy", SAVED)
def test_beside_a_gpu_what_it_reads_is_pinned_or_there(strategy: str, estimation: str, tmp_path: Path) -> None:
    run, made = Run([TOKENS], dim=64, device="cuda"), settings(strategy, estimation)
    caches: dict[bool, Any] = {}
    for gpu_only in (False, True):
        caches[gpu_only] = make_cache(strategy, made.model_copy(update={"gpu_only": gpu_only}), **run.common())
        run.prefill(caches[gpu_only])
        write_prefix(tmp_path / str(gpu_only), caches[gpu_only], {}, manifest(strategy))
    expected = run.decode(caches[False])
    for saved_with, gpu_only in ((False, False), (False, True), (True, False), (True, True)):
        again: Any = make_cache(strategy, made.model_copy(update={"gpu_only": gpu_only}), **run.common())
        fill_cache(again, tmp_path / str(saved_with), read_manifest(tmp_path / str(saved_with)))
        assert torch.allclose(run.decode(again), expected, rtol=1e-4, atol=1e-5)
        if strategy != "full":
            stores = (*again._keys, *again._values)
            assert all(store.is_cuda if gpu_only else store.is_pinned() for store in stores)
            assert again.index_bytes == caches[gpu_only].index_bytes


@pytest.mark.parametrize("estimation", ESTIMATIONS)
def test_a_loaded_cache_does_not_grow_and_one_that_grew_is_not_saved(estimation: str, tmp_path: Path) -> None:
    """Its store has no room behind the prompt; what is saved of a cache that has is the prompt alone."""
    run = Run([TOKENS], dim=DIM, steps=20)
    growing, static = (settings("attention_aware_graph", estimation, insert_batch=batch) for batch in (6, 0))
    caches = [make_cache("attention_aware_graph", knobs, **run.common()) for knobs in (growing, static)]
    for cache in caches:
        run.prefill(cache)
    write_prefix(tmp_path / "prefix", caches[0], {}, manifest("attention_aware_graph"))
    again = make_cache("attention_aware_graph", growing, **run.common())
    fill_cache(again, tmp_path / "prefix", read_manifest(tmp_path / "prefix"))
    expected = run.decode(caches[1])
    for _ in range(2):
        assert same(run.decode(again), expected)
        again.rewind()
    assert not same(run.decode(caches[0]), expected)
    with pytest.raises(ValueError, match="and 20 generated ones, allowed: a prefilled cache without generated tokens"):
        write_prefix(tmp_path / "other", caches[0], {}, manifest("attention_aware_graph"))


def test_keys_and_values_stay_in_the_files(saved: Any) -> None:
    run, _, folder = saved
    cache: Any = loaded(folder, run, "attention_aware_graph")
    for layer in range(LAYERS):
        for store in (cache._keys, cache._values):
            assert mapped_files(store[layer]) == [f"layer_{layer:03}.safetensors"]
        assert mapped_files(cache._groups[layer][0].index.links.data) == [f"layer_{layer:03}.index.safetensors"]


def test_a_prompt_attended_in_full_has_no_index(tmp_path: Path) -> None:
    run, cache = prefilled("attention_aware_graph", lengths=(70,))
    write_prefix(tmp_path / "prefix", cache, {}, manifest("attention_aware_graph", 70))
    again = loaded(tmp_path / "prefix", run, "attention_aware_graph")
    assert same(run.decode(again), run.decode(cache))
    assert again.stats.notes == cache.stats.notes != []


def test_clusters_are_made_where_the_prefix_has_none(tmp_path: Path) -> None:
    run, cache = prefilled("flat", "none")
    write_prefix(tmp_path / "prefix", cache, {}, manifest("flat"))
    _, clustered = prefilled("flat", "centroid")
    assert same(run.decode(loaded(tmp_path / "prefix", run, "flat", "centroid")), run.decode(clustered))


def test_clusters_are_left_alone_where_they_are_not_asked_for(saved: Any) -> None:
    run, _, folder = saved
    _, plain = prefilled("attention_aware_graph", "none")
    assert same(run.decode(loaded(folder, run, "attention_aware_graph", "none")), run.decode(plain))


def test_what_cannot_be_a_prefix_is_not_saved(tmp_path: Path) -> None:
    run, cache = prefilled("flat", lengths=(TOKENS, TOKENS))
    with pytest.raises(ValueError, match="batch_size: got 2, allowed: 1"):
        write_prefix(tmp_path / "prefix", cache, {}, manifest("flat"))
    run, cache = prefilled("flat")
    run.decode(cache)
    with pytest.raises(ValueError, match=f"got {TOKENS} tokens of a prompt and {run.steps} generated ones"):
        write_prefix(tmp_path / "prefix", cache, {}, manifest("flat"))
    with pytest.raises(ValueError, match="got 0 tokens of a prompt"):
        write_prefix(tmp_path / "prefix", make_cache("flat", settings("flat"), **run.common()), {}, manifest("flat"))
    assert not list(tmp_path.iterdir())


def test_only_an_empty_folder_or_a_new_one_is_taken(saved: Any, tmp_path: Path) -> None:
    folder = saved[2]
    with pytest.raises(ValueError, match="which is not empty"):
        check_free(folder)
    with pytest.raises(ValueError, match="which is a file"):
        check_free(folder / "prefix.json")
    with pytest.raises(ValueError, match="allowed: a new folder in one that exists"):
        check_free(tmp_path / "no" / "folder")
    (tmp_path / "empty").mkdir()
    _, cache = prefilled("flat")
    write_prefix(tmp_path / "empty", cache, {}, manifest("flat"))
    assert read_manifest(tmp_path / "empty").strategy == "flat"


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 2, 4])
def test_an_interrupted_save_leaves_nothing(
    error: BaseException, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cache = prefilled("attention_aware_graph")
    calls = []

    def interrupted(layer_idx: int) -> Any:
        calls.append(layer_idx)
        if len(calls) > after // 2:
            raise error
        return type(cache).layer_tensors(cache, layer_idx)

    monkeypatch.setattr(cache, "layer_tensors", interrupted)
    if after == 4:  # all but the manifest
        monkeypatch.undo()
        monkeypatch.setattr("cache_hub.prefix._write_manifest", lambda *a: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        write_prefix(tmp_path / "prefix", cache, {}, manifest("attention_aware_graph"))
    assert not list(tmp_path.iterdir())


def test_a_folder_without_its_manifest_is_none(saved: Any) -> None:
    """What a killed process leaves: the manifest is written last."""
    run, _, folder = saved
    (folder / "prefix.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no prefix\.json"):
        loaded(folder, run, "attention_aware_graph")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "layer_001.safetensors").unlink(), "layer_001.safetensors: missing"),
        (lambda f: (f / "layer_001.index.safetensors").unlink(), "layer_001.index.safetensors: missing"),
        (lambda f: (f / "prefix.json").write_text("{"), "got no JSON"),
        (lambda f: (f / "prefix.json").write_text("[]"), "got None version None, allowed: 'prefix' version 1"),
        (lambda f: seal_manifest(f, version=2), "got 'prefix' version 2, allowed: 'prefix' version 1"),
        (lambda f: seal_manifest(f, tokens="many"), "tokens"),
        (lambda f: seal_manifest(f, tokens=299), r"keys: got .* allowed: .*299"),
        (lambda f: shutil.copy(f / "layer_000.safetensors", f / "layer_001.safetensors"), "file of another prefix"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused(change: Any, message: str, saved: Any) -> None:
    run, _, folder = saved
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loaded(folder, run, "attention_aware_graph")


def test_layers_cannot_change_places(saved: Any) -> None:
    run, _, folder = saved
    shutil.copy(folder / "layer_000.safetensors", folder / "layer_001.safetensors")
    seal_manifest(folder)
    with pytest.raises(ValueError, match="got layer 0, allowed: 1"):
        loaded(folder, run, "attention_aware_graph")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("assignment", lambda t: t + 1000, "assignment: got ids"),
        ("assignment", lambda t: t - 1, "assignment: got ids"),
        ("assignment", lambda t: t.flip(2), "sizes: got others"),
        ("sizes", lambda t: t * 2, "sizes: got others"),
        ("centroids", lambda t: t[:, :, 1:], "centroids: got"),
        ("query_moment", lambda t: None, "query_moment: missing"),
        ("keys", lambda t: t.half(), "keys: got torch.float16"),
        ("keys", lambda t: t + 1, "allowed: those that .* was built for"),
        ("values", lambda t: t[..., :8], "values: got"),
    ],
)
def test_tables_that_contradict_each_other_are_refused(name: str, change: Any, message: str, saved: Any) -> None:
    """Even with right digests."""
    run, _, folder = saved
    path = folder / "layer_001.safetensors"
    tensors = open_tensors(path)[0]
    changed = change(tensors[name].clone())
    if name == "assignment" and message.startswith("sizes"):
        changed[0, 0, :5] = changed[0, 0, 5]
    replace_tensor(path, name, changed)
    seal_manifest(folder)
    with pytest.raises(ValueError, match=message):
        loaded(folder, run, "attention_aware_graph")


@pytest.mark.parametrize("strategy", SAVED)
def test_a_damaged_prefix_is_refused_or_gives_the_same(strategy: str, tmp_path: Path) -> None:
    run, cache = prefilled(strategy, "softmax_lift" if strategy == "flat" else "centroid")
    estimation = "softmax_lift" if strategy == "flat" else "centroid"
    whole = tmp_path / "whole"
    write_prefix(whole, cache, {"x": torch.ones(3)}, manifest(strategy))
    expected, refused, tried = run.decode(cache), 0, 0
    for name in sorted(path.name for path in whole.iterdir()):
        for seed in range(25):
            folder = tmp_path / f"{name}.{seed}"
            shutil.copytree(whole, folder)
            damage(folder / name, seed)
            tried += 1
            try:
                assert same(run.decode(loaded(folder, run, strategy, estimation)), expected)
            except (ValueError, FileNotFoundError):
                refused += 1
            shutil.rmtree(folder)
    assert refused > 0.9 * tried


def test_damage_under_right_digests_never_crashes(saved: Any, tmp_path: Path) -> None:
    """The loader is given bytes that only its checks of the content can refuse; decoding must come to an end."""
    run, _, whole = saved
    refused = 0
    names = [path.name for path in whole.iterdir() if path.suffix == ".safetensors"]
    for name in sorted(names):
        for seed in range(30):
            folder = tmp_path / f"{name}.{seed}"
            shutil.copytree(whole, folder)
            damage(folder / name, seed)
            try:
                seal(folder / name)
                seal_manifest(folder)
                run.decode(loaded(folder, run, "attention_aware_graph"))
            except (ValueError, FileNotFoundError):
                refused += 1
            shutil.rmtree(folder)
    assert refused > 30


def test_the_manifest_says_what_is_there(saved: Any) -> None:
    content = json.loads((saved[2] / "prefix.json").read_text())
    assert content["strategy"] == "attention_aware_graph"
    assert content["tokens"] == TOKENS
    names = [f"layer_{layer:03}{kind}.safetensors" for layer in range(LAYERS) for kind in ("", ".index")]
    assert content["files"].keys() == {"head.safetensors", *names}
    assert {path.name for path in saved[2].iterdir()} == {"prefix.json", *content["files"]}
