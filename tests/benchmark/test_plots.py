"""Drawings of attention: the cells are the matrix's, a PNG is written whole, bad flags."""

from pathlib import Path

import pytest
import torch
from index_cases import write_trace

from benchmark.plots import attention


@pytest.mark.parametrize(("tokens", "cells"), [(63, 63), (63, 10), (100, 7), (5, 256)])
def test_cells_are_sums_over_keys_and_means_over_queries(tokens: int, cells: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    query, key = (torch.randn(tokens, 16, generator=generator) for _ in range(2))
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = (query.double() @ key.double().T / 4).masked_fill(future, float("-inf")).softmax(-1)
    made = torch.from_numpy(attention.attention_cells(query, key, cells))
    size = -(-tokens // cells)
    expected = torch.stack(
        [torch.stack([part.sum(1).mean() for part in rows.split(size, 1)]) for rows in weights.split(size)]
    )
    assert made.shape == expected.shape
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(made.sum(1), torch.ones(len(made), dtype=torch.float64), rtol=1e-5, atol=0)


def test_a_drawing_is_written(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "a", n=200, group=3, dim=16, tests=5)
    words = ["--trace", str(trace), "--layer", "2", "--heads", "0,5", "--budget", "50", "--cells", "20"]
    assert attention.main([*words, "--output", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
    assert not (tmp_path / "p.png.part").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layer 7", "layer: got 7, allowed: 0, 2"),
        ("--heads 6", "heads: got '6', allowed: 0 to 5"),
        ("--budget 200", "budget, cells: got 200, 256, allowed: 1 to 199, 1 or more"),
        ("--strategies flat", "strategies: got 'flat', allowed: streaming_llm, h2o, snapkv"),
    ],
)
def test_bad_input(tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_trace(tmp_path / "a", n=200, group=3, dim=16, tests=5)
    argv = ["--trace", str(trace), "--budget", "50", *words.split(), "--output", str(tmp_path / "p.png")]
    assert attention.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()
