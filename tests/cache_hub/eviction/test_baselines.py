"""The scores that StreamingLLM, H2O, SnapKV and PyramidKV give, against a direct dense computation."""

import pytest
import torch
import torch.nn.functional as F

from cache_hub.eviction.attention import causal_rows, received_mass
from cache_hub.eviction.baselines import H2O, PyramidKV, SnapKV, StreamingLLM
from config import RetroInferConfig

SHAPES = [(1, 2, 1, 64, 11), (2, 2, 3, 64, 63), (1, 1, 4, 128, 127)]


def states(batch: int, kv_heads: int, group: int, dim: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(batch, n, kv_heads * group, dim, generator=generator)
    return query, torch.randn(batch, n, kv_heads, dim, generator=generator)


def dense(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, g, n, n] float64."""
    group = query.shape[2] // key.shape[2]
    logits = torch.einsum("bihd,bjhd->bhij", query.double(), key.double().repeat_interleave(group, 2))
    n = key.shape[1]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    weights = logits.div(query.shape[3] ** 0.5).masked_fill(future, float("-inf")).softmax(-1)
    return weights.unflatten(1, (key.shape[2], group))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_rounded_states_are_not_rounded_again(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key = (part.to(dtype) for part in states(*shape))
    n = shape[-1]
    rows, expected = causal_rows(query, key, n - 5, n), dense(query, key)[:, :, :, n - 5 :]
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(rows.double(), expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_attention(shape: tuple[int, ...]) -> None:
    query, key = states(*shape)
    expected, n = dense(query, key), shape[-1]
    for start, stop in ((0, n), (n - 3, n), (2, 7)):
        rows = causal_rows(query, key, start, stop)
        torch.testing.assert_close(rows.double(), expected[:, :, :, start:stop, :stop], rtol=1e-5, atol=1e-6)
    for block in (1, 4, n, 2 * n):
        torch.testing.assert_close(received_mass(query, key, block).double(), expected.sum(3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", ["mean", "max"])
def test_scores_are_those_of_the_whole_matrix(shape: tuple[int, ...], group: str) -> None:
    query, key = states(*shape)
    weights, n = dense(query, key), shape[-1]
    reduce = (lambda scores: scores.mean(2)) if group == "mean" else (lambda scores: scores.amax(2))
    h2o = H2O.of(RetroInferConfig(eviction={"group": group}))
    torch.testing.assert_close(h2o.score(query, key).double(), reduce(weights.sum(3)), rtol=1e-5, atol=1e-5)
    window = 8
    observed = reduce(weights[:, :, :, -window:].sum(3))[..., :-window]
    pooled = {
        "max": F.max_pool1d(observed, 5, 1, 2), "average": F.avg_pool1d(observed, 5, 1, 2), "none": observed,
    }  # fmt: skip
    for pooling, expected in pooled.items():
        options = {"group": group, "pooling": pooling, "kernel_size": 5, "window": window}
        for scorer in (SnapKV, PyramidKV):
            scores = scorer.of(RetroInferConfig(eviction=options)).score(query, key)
            torch.testing.assert_close(scores[..., :-window].double(), expected, rtol=1e-5, atol=1e-6)
            assert scores.shape == (shape[0], shape[1], n)


def test_streaming_llm_prefers_the_latest() -> None:
    query, key = states(*SHAPES[1])
    scores = StreamingLLM.of(RetroInferConfig()).score(query, key)
    assert (scores.diff(dim=-1) > 0).all()


@pytest.mark.parametrize(
    ("budget", "layers", "tokens"), [(128, 30, 8192), (512, 32, 8192), (1024, 32, 2100), (64, 2, 500)]
)
def test_a_pyramids_layers_keep_the_budget_in_the_mean(budget: int, layers: int, tokens: int) -> None:
    scorer = PyramidKV.of(RetroInferConfig())
    kept = [scorer.capacity(budget, layer, layers, tokens) for layer in range(layers)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1] > scorer.window
    assert sum(kept) == pytest.approx(layers * budget, rel=0.02 + layers / budget)
    assert kept[0] <= tokens


def test_a_short_prompts_layers_all_keep_the_budget() -> None:
    """As published: where the budget without the window is more than half of the prompt."""
    scorer = PyramidKV.of(RetroInferConfig())
    assert {scorer.capacity(100, layer, 8, 183) for layer in range(8)} == {100}
    assert scorer.capacity(100, 0, 8, 184) > 100
    assert scorer.capacity(100, 0, 1, 5000) == 100
