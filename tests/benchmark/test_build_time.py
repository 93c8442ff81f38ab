"""What a prefill takes with and without the build: the rows, resume, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from index_cases import write_trace

from benchmark.decode.dense import DenseSizes
from benchmark.decode.extended import ExtendedTraces, Shape
from benchmark.index import build_time
from benchmark.index.traces import open_folder

SMALL = ["--shape", "4,8,2,32", "--layers", "2", "--hidden", "24", "--mlp", "40", "--vocab", "50", "--new", "4"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """200 tokens, layers 0 and 2, 3 kv heads of group 3, d = 16."""
    return write_trace(tmp_path / "a", n=200, layers=(0, 2), kv_heads=3, group=3, dim=16)


def call(trace: Path, *words: str, device: str = "cpu", dtype: str = "fp32") -> int:
    where = ["--device", device, "--dtype", dtype, "--output", str(trace.parent / "o.json")]
    return build_time.main(["--traces", str(trace), *SMALL, *where, "--rounds", "2", *words])


def written(trace: Path) -> Any:
    return json.loads((trace.parent / "o.json").read_text())


def check_row(row: dict[str, Any], layers: int) -> None:
    times, stages = row["ms_per_layer"], row["stage_ms_per_layer"]
    assert stages.keys() == set(build_time.STAGES)
    assert min(stages[name] for name in ("query_key_knn", "key_key_knn", "projection", "cluster")) > 0
    assert row["build_of_prefill"] == pytest.approx(sum(stages.values()) / times["prefill"])
    assert row["added_of_prefill"] == pytest.approx(times["added"] / times["prefill"])
    assert [len(row["seconds"][name]) for name in ("prefill", "with_build")] == [2, 2], "the first is not timed"
    differences = [b - a for a, b in zip(row["seconds"]["prefill"], row["seconds"]["with_build"], strict=True)]
    assert times["added"] == pytest.approx(1e3 * sum(differences) / 2 / layers)
    assert not row["notes"]


def test_a_row_for_every_length_and_none_twice(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(trace, "--lengths", "150") == 0
    measured = []
    row_of = build_time.Build.row
    monkeypatch.setattr(build_time.Build, "row", lambda self, *given: measured.append(given[1]) or row_of(self, *given))
    assert call(trace, "--lengths", "150,190") == 0
    assert measured == [190]
    content = written(trace)
    assert [row["context_len"] for row in content["rows"]] == [150, 190]
    assert content["protocol"]["layers"] == 2
    for row in content["rows"]:
        check_row(row, 2)
        assert row["stage_ms_per_layer"]["repair"] == 0, "part of the projection on a CPU"
    assert capsys.readouterr().out.count("| 150 |") == 2


def test_the_attention_of_a_layer_gets_the_recorded_states(trace: Path) -> None:
    extended = ExtendedTraces([open_folder(trace)], Shape(4, 8, 2, 32), 1)
    args = build_time.parse_args(
        ["--traces", str(trace), *SMALL, "--device", "cpu", "--dtype", "fp32", "--output", "x", "--distinct", "1"]
    )
    with torch.inference_mode():
        build = build_time.Build(args, extended)
        build.show(180)
        settings = build_time.RetroInferConfig()
        _, cache = build.prefill("attention_aware_graph", settings, 180)
    made = extended.states(0, 0, 180, torch.float32)
    for layer in range(2):
        assert torch.equal(cache._keys[layer][0, :, :180].transpose(0, 1), made.keys)
        assert torch.equal(cache._values[layer][0, :, :180].transpose(0, 1), made.values)
    sizes = DenseSizes(24, 40, 50)
    assert [tuple(part.weight.shape) for part in (build.layers[0].gate_up, build.layers[0].down)] == [
        (2 * sizes.mlp, sizes.hidden),
        (sizes.hidden, sizes.mlp),
    ]
    assert not torch.equal(build.layers[0].qkv.weight, build.layers[1].qkv.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_beside_a_gpu_another_thread_finishes(trace: Path) -> None:
    assert call(trace, "--lengths", "190", device="cuda:0", dtype="bf16") == 0
    (row,) = written(trace)["rows"]
    check_row(row, 2)
    assert min(row["stage_ms_per_layer"][name] for name in ("repair", "pack")) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "250"], "context_len: got 250, allowed: 5 to 200"),
        (["--lengths", "0"], "lengths: got '0', allowed: a comma list of numbers >= 1"),
        (["--layers", "0"], "layers: got 0, allowed: >= 1"),
        (["--distinct", "0"], "distinct: got 0, allowed: >= 1"),
        (["--shape", "4,8,3,32"], "shape: got 8 heads, allowed: a multiple of the 3 kv heads"),
        (["--device", "cuda:9"], "device: got 'cuda:9', allowed here: cpu"),
    ],
)
def test_bad_input(words: list[str], message: str, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(trace, "--lengths", "150", *words) == 2
    assert message in capsys.readouterr().err
    assert not (trace.parent / "o.json").exists()
