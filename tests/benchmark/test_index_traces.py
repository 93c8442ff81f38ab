"""Trace files: what is read, what is held out, and what is refused with which words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from index_cases import random_head, write_trace

from benchmark.index.layers import parse_layers
from benchmark.index.traces import HELD_OUT, file_name, open_folder, read_file


def test_a_layer_holds_all_its_kv_heads(tmp_path: Path) -> None:
    folder = open_folder(write_trace(tmp_path / "a"))
    assert list(folder.files) == [0, 2]
    assert folder.tokens == 300
    trace = folder.load(2)
    second = random_head(seed=201)
    assert trace.queries.shape == (2, 3, 300, 32)
    assert trace.tests.shape == (2, 3, 4, 32)
    assert not trace.held_out
    for states, name in ((trace.queries, "q"), (trace.keys, "k"), (trace.values, "v"), (trace.tests, "q_decode")):
        assert torch.equal(states[1], torch.from_numpy(second[name]))


@pytest.mark.parametrize("tests", [0, None])
def test_without_decode_queries_the_last_positions_are_held_out(tmp_path: Path, tests: int | None) -> None:
    folder = write_trace(tmp_path / "a", layers=(0,), kv_heads=1, tests=0)
    arrays = random_head(tests=0)
    if tests is None:
        del arrays["q_decode"]
        np.savez(folder / file_name(0, 0), **arrays)
    opened = open_folder(folder)
    trace = opened.load(0)
    assert trace.held_out
    assert opened.tokens == trace.keys.shape[1] == 300 - HELD_OUT
    assert torch.equal(trace.tests[0], torch.from_numpy(arrays["q"][:, -HELD_OUT:]))
    assert torch.equal(trace.queries[0], torch.from_numpy(arrays["q"][:, :-HELD_OUT]))
    assert torch.equal(trace.keys[0], torch.from_numpy(arrays["k"][:-HELD_OUT]))
    assert torch.equal(trace.values[0], torch.from_numpy(arrays["v"][:-HELD_OUT]))


@pytest.mark.parametrize(("tests", "n", "before"), [(4, 300, 64), (4, 37, 37), (0, 300, 48), (0, 37, 21)])
def test_predicted_queries_are_of_the_last_positions_and_the_tests(
    tmp_path: Path, tests: int, n: int, before: int
) -> None:
    folder = open_folder(write_trace(tmp_path / "a", layers=(0, 1, 2), n=n, tests=tests, predicted=(1, 2)))
    assert folder.predicted == {1: before, 2: before}
    assert folder.load(0).predicted is None
    trace = folder.load(2)
    assert trace.predicted is not None
    assert trace.predicted.shape == (2, 3, before + trace.tests.shape[2], 32)
    expected = random_head(n=n, tests=tests, seed=201, predicted=True)["q_predicted"]
    assert torch.equal(trace.predicted[1], torch.from_numpy(expected))


def test_some_kv_heads_of_a_layer_without_predicted_queries_are_refused(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "a", predicted=(2,))
    for head, told in ((1, "k, v, q_decode, allowed: q, k, v, q_decode, q_predicted"), (0, "q_predicted, allowed: q,")):
        np.savez(folder / file_name(2, 0), **random_head(seed=200, predicted=True))
        np.savez(folder / file_name(2, head), **random_head(seed=200 + head))
        with pytest.raises(ValueError, match=rf"layer02_head01.npz: has .*{told}"):
            open_folder(folder)
        np.savez(folder / file_name(2, 1), **random_head(seed=201, predicted=True))


def test_too_short_to_hold_out(tmp_path: Path) -> None:
    write_trace(tmp_path / "a", n=HELD_OUT, tests=0)
    with pytest.raises(ValueError, match=r"layer 0: 16 tokens and no q_decode, allowed: more than the 16 positions"):
        open_folder(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": None}, r"layer00_head01.npz: array k is missing, has q, v, q_decode; needs q, k, v"),
        ({"v": np.zeros((299, 32), np.float16)}, r"shapes do not fit: q \[3, 300, 32\].*allowed: q \[g, n, d\]"),
        ({"k": np.zeros((1, 300, 32), np.float16)}, "shapes do not fit"),
        ({"q": np.zeros((300, 32), np.float16)}, "shapes do not fit"),
        ({"q_decode": np.zeros((2, 4, 32), np.float16)}, "shapes do not fit"),
        ({"q_predicted": np.zeros((3, 67, 32), np.float16)}, r"shapes do not fit.*allowed: .*q_predicted \[g, min"),
        ({"q_predicted": np.zeros((68, 32), np.float16)}, "shapes do not fit"),
        ({"q_predicted": np.zeros((3, 68, 32))}, "q_predicted is float64, allowed: float16, float32"),
        ({"k": np.zeros((300, 32), np.int32)}, "k is int32, allowed: float16, float32"),
        ({"q": np.array([{}])}, "not a readable .npz file of plain arrays: Object arrays"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, change: dict[str, np.ndarray | None], told: str) -> None:
    folder = write_trace(tmp_path / "a")
    arrays = {**random_head(), **change}
    np.savez(folder / file_name(0, 1), **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=told):
        open_folder(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "q_decode", "q_predicted"])
def test_nan_and_infinity_are_refused(tmp_path: Path, name: str, value: float) -> None:
    arrays = random_head(predicted=True)
    arrays[name][..., 2, 5] = value
    np.savez(tmp_path / "layer00_head00.npz", **arrays)
    with pytest.raises(ValueError, match=rf"{name} holds {value} at \[.*2, 5\], allowed: finite values"):
        read_file(tmp_path / "layer00_head00.npz")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "a")
    path = folder / file_name(2, 0)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"layer02_head00.npz: not a readable .npz file"):
        open_folder(folder)


def test_heads_and_layers_of_different_prompts_are_refused(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "a")
    np.savez(folder / file_name(2, 1), **random_head(n=290))
    with pytest.raises(ValueError, match=r"layer02_head01.npz: q is \[3, 290, 32\], allowed: \[3, 300, 32\]"):
        open_folder(folder)
    np.savez(folder / file_name(2, 0), **random_head(n=290))
    with pytest.raises(ValueError, match=r"mixes prompts.*layer 0 \[2, 3, 300, 4\], layer 2 \[2, 3, 290, 4\]"):
        open_folder(folder)
    assert open_folder(folder, [2]).tokens == 290


def test_missing_folders_files_and_layers_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        open_folder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no files layer\.\.\._head\.\.\.\.npz"):
        open_folder(tmp_path / "empty")
    folder = write_trace(tmp_path / "a")
    with pytest.raises(ValueError, match=r"layers: got \[1, 7\], allowed for .*: 0, 2"):
        open_folder(folder, [0, 1, 7])
    (folder / file_name(2, 1)).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 files of its trace.json \(layer02_head01.npz\)"):
        open_folder(folder)
    (folder / "trace.json").write_text("{")
    with pytest.raises(ValueError, match=r"trace.json: not JSON"):
        open_folder(folder)


def test_a_digest_tells_traces_apart(tmp_path: Path) -> None:
    one, two = (open_folder(write_trace(tmp_path / name / "a")) for name in ("one", "two"))
    assert one.digest == two.digest
    info = json.loads((two.path / "trace.json").read_text())
    info["protocol"]["seed"] = 7
    (two.path / "trace.json").write_text(json.dumps(info))
    assert open_folder(two.path).digest != one.digest
    assert open_folder(one.path, [0]).digest != one.digest
    arrays = random_head(seed=201)
    arrays["v"][5, 3] += 1
    np.savez(one.path / file_name(2, 1), **arrays)
    assert open_folder(one.path).digest != one.digest


def test_layer_lists() -> None:
    assert parse_layers("3,0,10-12,11") == [0, 3, 10, 11, 12]
    for bad in ("", "a", "3-1", "1,,2", "-1"):
        with pytest.raises(ValueError, match="layers: got"):
            parse_layers(bad)
