"""The window's closed form against the solve on the surrogate matrix written out, and the window's attention."""

import pytest
import torch
from chain_cases import random_attention

from cache_hub.eviction.chain import absorbing_chain_scores
from cache_hub.eviction.surrogate import surrogate_chain_scores


def written_out(window: torch.Tensor) -> torch.Tensor:
    """The surrogate matrix [B, H, n, n] of a window's rows [B, H, W, n]."""
    rows, n = window.shape[2:]
    profile = window[..., : n - rows].sum(2).clamp(min=1e-12)
    matrix = torch.zeros(*window.shape[:2], n, n, dtype=window.dtype)
    matrix[..., 0, 0] = 1
    for i in range(1, n - rows):
        matrix[..., i, :i] = profile[..., :i] / profile[..., :i].sum(-1, keepdim=True)
    matrix[..., n - rows :, :] = window
    return matrix


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("start", ["query", "uniform", "window"])
@pytest.mark.parametrize(("n", "window", "sink_size"), [(5, 1, 4), (5, 2, 1), (63, 8, 4), (127, 64, 4), (127, 31, 16)])
@pytest.mark.parametrize("sink", [0.0, 8.0])
def test_closed_form_is_the_solve(n: int, window: int, sink_size: int, start: str, gamma: float, sink: float) -> None:
    attention = random_attention(n, sink)[..., n - window :, :]
    found = surrogate_chain_scores(attention, start, sink_size, gamma)
    expected = absorbing_chain_scores(written_out(attention), start, sink_size, 1.0, gamma, window)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-16)
    if gamma == 1:
        torch.testing.assert_close(found[..., :sink_size].sum(-1), torch.ones(2, 3).double(), rtol=1e-12, atol=0)


def test_prefix_tokens_that_the_window_ignores_have_a_score() -> None:
    """Columns of zeros, the first among them, are clipped and give no NaN."""
    attention = random_attention(63)[..., 55:, :].clone()
    attention[..., [0, 1, 2, 3, 20]] = 0
    attention = attention / attention.sum(-1, keepdim=True)
    found = surrogate_chain_scores(attention, "query")
    expected = absorbing_chain_scores(written_out(attention), "query")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    single = surrogate_chain_scores(attention.float(), "query")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-7)


def test_a_token_of_the_window_that_attends_to_hardly_anything_else() -> None:
    """What leaves it is far below what float32 has beside 1."""
    attention = random_attention(63)[..., 55:, :].clone()
    attention[:, :, 3] *= 1e-9
    attention[:, :, 3, 58] += 1 - attention[:, :, 3].sum(-1)
    expected = surrogate_chain_scores(attention, "uniform")
    found = surrogate_chain_scores(attention.float(), "uniform")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_bad_input_is_told() -> None:
    attention = random_attention(63)[..., 55:, :].clone()
    for sink_size in (0, 56):
        with pytest.raises(ValueError, match=f"sink_size: got {sink_size}, allowed: 1 to 55"):
            surrogate_chain_scores(attention, "query", sink_size)
    with pytest.raises(ValueError, match="gamma: got 0"):
        surrogate_chain_scores(attention, gamma=0)
    with pytest.raises(ValueError, match="start: got 'sinks'"):
        surrogate_chain_scores(attention, "sinks")
    absorbing, nan = attention.clone(), attention.clone()
    absorbing[1, 0, 2] = 0
    absorbing[1, 0, 2, 57] = 1
    nan[0, 0, 3, 7] = torch.nan
    with pytest.raises(ValueError, match=r"token 57 is absorbing: Q\[57,57\] = 1 \(batch 1, head 0\)"):
        surrogate_chain_scores(absorbing)
    with pytest.raises(ValueError, match="got NaN"):
        surrogate_chain_scores(nan)
