"""The build's memory: what the watch sees, what a process reports, and what is refused before any work."""

import json
from pathlib import Path

import pytest
import torch
from index_cases import write_trace

from benchmark.index.build_memory import main
from benchmark.index.build_process import PeakWatch

MIB = 2**20


def test_the_watch_sees_what_was_freed_again() -> None:
    watch = PeakWatch()
    watch.begin_layer()
    kept = torch.ones(64 * MIB, dtype=torch.uint8)
    watch.mark("kept")
    torch.ones(128 * MIB, dtype=torch.uint8)
    watch.mark("freed")
    watch.begin_layer()
    watch.mark("nothing")
    assert watch.stages["kept"] / MIB == pytest.approx(64, abs=4)
    assert watch.stages["freed"] / MIB == pytest.approx(192, abs=4)
    assert watch.stages["nothing"] / MIB == pytest.approx(0, abs=4), "over what the layer before left"
    assert watch.peak / MIB == pytest.approx(192, abs=4)
    assert watch.held() / MIB == pytest.approx(64, abs=4)
    assert len(kept)


def test_a_row_for_every_estimation_with_all_layers_and_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_trace(tmp_path / "a", n=3000, dim=32, group=3)
    words = ["--traces", str(folder), "--estimations", "centroid,none", "--dtype", "fp32"]
    assert main([*words, "--set", "attention_aware_graph.index_dtype=auto", "--output", str(tmp_path / "o.json")]) == 0
    written = json.loads((tmp_path / "o.json").read_text())
    rows = {(row["layers"], row["estimation"]): row for row in written["rows"]}
    assert list(rows) == [(2, "none"), (2, "centroid"), (1, "none"), (1, "centroid")]
    for (layers, _), row in rows.items():
        assert row["kv_bytes"] == layers * 2 * 2 * 3000 * 32 * 4
        assert row["peak_bytes"] >= row["kv_bytes"] + row["index_bytes"], "all of it is resident at the end"
        assert row["peak_ratio"] == row["peak_bytes"] / (row["kv_bytes"] + row["index_bytes"])
        assert {"store", "query_key_knn", "key_key_knn", "projection", "clusters"} <= row["stages"].keys()
        assert max(row["stages"].values()) <= row["peak_bytes"] + MIB
    assert rows[2, "none"]["index_bytes"] == 2 * rows[1, "none"]["index_bytes"]
    assert rows[2, "none"]["index_bytes"] < rows[2, "centroid"]["index_bytes"]
    assert "| a | 2 | none |" in capsys.readouterr().out


def test_the_states_are_not_counted(tmp_path: Path) -> None:
    """Without an index, little is needed but the store: 30 query heads would be 15 times its keys."""
    folder = write_trace(tmp_path / "a", layers=(0, 1, 2, 3), kv_heads=1, n=10000, dim=64, group=30)
    words = ["--traces", str(folder), "--strategy", "flat", "--estimations", "none", "--dtype", "fp32"]
    assert main([*words, "--output", str(tmp_path / "o.json")]) == 0
    row = json.loads((tmp_path / "o.json").read_text())["rows"][0]
    kv = 4 * 2 * 10000 * 64 * 4
    assert (row["kv_bytes"], row["index_bytes"]) == (kv, 0)
    assert kv <= row["held_bytes"] < 1.1 * kv


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--estimations", "none,mean"], "estimations: got mean, allowed: none, centroid, softmax_lift"),
        (["--threads", "0"], "threads: got 0, allowed: >= 1"),
        (["--set", "attention_aware_graph.q_knn=1"], "q_knn"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    folder = write_trace(tmp_path / "a", n=100, dim=16, group=1)
    assert main(["--traces", str(folder), *words, "--output", str(tmp_path / "o.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()
