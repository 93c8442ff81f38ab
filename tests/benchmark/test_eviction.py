"""What eviction leaves of a trace's attention: every method at once, the bounds, a second call, bad flags."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_cases import write_trace

from benchmark import eviction
from benchmark.index.traces import open_folder

BUDGETS = [20, 60, 150]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """200 tokens, layers 0 and 2, 2 kv heads of group 3, d = 16."""
    return write_trace(tmp_path / "a", n=200, group=3, dim=16, tests=5)


def call(trace: Path, *words: str) -> int:
    budgets = ",".join(map(str, BUDGETS))
    where = ["--traces", str(trace), "--device", "cpu", "--output", str(trace.parent / "o.json")]
    return eviction.main([*where, "--budgets", budgets, *words])


def rows_of(trace: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((trace.parent / "o.json").read_text())["rows"]
    return rows


def test_every_method_keeps_less_than_the_bounds(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(trace) == 0
    rows = {row["name"]: row for row in rows_of(trace)}
    assert [*rows] == [*eviction.STRATEGIES_SHOWN.split(","), "best set", "top per query"]
    mass = {name: np.array(row["mass"]) for name, row in rows.items()}  # [layers, budgets, kv heads]
    for name, found in mass.items():
        assert found.shape == (2, 3, 2)
        assert (np.diff(found, axis=1) > 0).all(), f"{name}: more tokens, more mass"
        assert (found <= mass["best set"] + 1e-12).all() or name == "top per query"
    assert (mass["best set"] < mass["top per query"]).all()
    assert np.array(rows["top per query"]["error"])[:, -1].max() < 0.5
    printed = capsys.readouterr().out
    assert "| mass | 20 | 60 | 150 |" in printed
    assert "| error | 20 | 60 | 150 |" in printed
    assert rows["snapkv"]["environment"]["python"]


def test_masses_and_errors_are_those_of_the_tokens_kept(trace: Path) -> None:
    assert call(trace, "--strategies", "streaming_llm") == 0
    layer = open_folder(trace).load(2)
    kept = [*range(4), *range(200 - 56, 200)]
    logits = torch.einsum("hgtd,hnd->hgtn", layer.tests.double(), layer.keys.double()) / 4
    weights = logits.softmax(-1)
    full = torch.einsum("hgtn,hnd->hgtd", weights, layer.values.double())
    part = torch.einsum("hgtn,hnd->hgtd", logits[..., kept].softmax(-1), layer.values[:, kept].double())
    error = ((part - full).norm(dim=-1) / full.norm(dim=-1)).mean((1, 2))
    row = rows_of(trace)[0]
    assert row["layers"] == [0, 2]
    assert row["mass"][1][1] == pytest.approx(weights[..., kept].sum(-1).mean((1, 2)).tolist())
    assert row["error"][1][1] == pytest.approx(error.tolist())


def test_a_second_call_goes_on(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--strategies", "snapkv,streaming_llm"]
    assert call(trace, *words) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(eviction, "_scores", None)
    assert call(trace, *words) == 0
    assert capsys.readouterr().out == first
    assert call(trace, *words, "--set", "eviction.window=16") == 2
    assert "another protocol" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budgets", "100,x"], "budgets: got '100,x', allowed: a comma list of numbers >= 1"),
        (["--budgets", "200"], "budgets: got 200, allowed: less than the 200 tokens of"),
        (["--budgets", "8"], "budgets: got 8, allowed: more than 8, what is always kept"),
        (["--strategies", "pyramidkv"], "strategies: got 'pyramidkv', allowed: streaming_llm, h2o, snapkv"),
        (["--strategies", "flat"], "strategies: got 'flat', allowed: streaming_llm, h2o, snapkv"),
        (["--strategies", "circuitkv+x"], "circuitkv.score: got 'x' in 'circuitkv+x', allowed: query, hub"),
        (["--set", "flat.on_gpu=true"], "set: got 'flat.on_gpu=true', allowed: eviction.KEY=VALUE, circuitkv.KEY"),
        (["--set", "eviction.kernel_size=4"], "eviction.kernel_size: got 4, allowed: an odd number >= 1"),
    ],
)
def test_bad_input(trace: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(trace, "--strategies", "snapkv", *words) == 2
    assert message in capsys.readouterr().err
    assert not (trace.parent / "o.json").exists()
