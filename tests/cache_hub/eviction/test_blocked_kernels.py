"""The blocked chain's kernels against plain torch, in float64 on the same rounded inputs."""

import pytest
import torch
from chain_cases import queries_and_keys
from torch import Tensor

from cache_hub.eviction import attention, blocked, surrogate
from cache_hub.eviction.attention import received_mass
from cache_hub.eviction.blocked import blocked_chain_scores, causal_log_sum_exp
from cache_hub.eviction.blocked_reference import torch_log_sums, torch_solve
from cache_hub.eviction.surrogate import window_chain_scores

SHAPES = [(2, 2, 64, 5), (6, 2, 64, 63), (4, 1, 128, 127), (3, 3, 80, 130), (1, 1, 64, 1), (3, 1, 64, 257)]


def inputs(heads: int, kv_heads: int, dim: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two different sequences, laid out [B, n, heads, D]."""
    query, key = (part.expand(2, -1, -1, -1).clone() for part in queries_and_keys(n, heads, kv_heads, dim, 3.0))
    query[1] = query[1].flip(1)
    return tuple(part.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "n"), SHAPES)
def test_log_sums(device: str, heads: int, kv_heads: int, dim: int, n: int, dtype: torch.dtype) -> None:
    from cache_hub.eviction.blocked_kernels import triton_log_sums

    query, key = inputs(heads, kv_heads, dim, n, dtype)
    expected = torch_log_sums(query.double(), key.double(), 0.2)
    found = triton_log_sums(query.to(device), key.to(device), 0.2)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5)
    assert bool((found[1][..., 0] == -torch.inf).all())


@pytest.mark.parametrize(
    ("sink_size", "dtype", "starts"), [(1, torch.bfloat16, 1), (4, torch.float32, 3), (3, torch.float16, 2)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "n"), [shape for shape in SHAPES if shape[3] > 4])
def test_solve(
    device: str, heads: int, kv_heads: int, dim: int, n: int, sink_size: int, dtype: torch.dtype, starts: int
) -> None:
    from cache_hub.eviction.blocked_kernels import triton_solve

    query, key = inputs(heads, kv_heads, dim, n, dtype)
    others = torch_log_sums(query.double(), key.double(), 0.2)[1]
    others[..., :sink_size] = torch.inf
    generator = torch.Generator().manual_seed(n)
    expected = torch.rand(2, heads, starts, n, dtype=torch.float64, generator=generator)
    found = expected.float().to(device)
    triton_solve(query.to(device), key.to(device), others.float().to(device), found, 0.2, sink_size)
    torch_solve(query.double(), key.double(), others, expected, 0.2, sink_size)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [0.0, 40.0])
def test_more_sinks_than_a_block(device: str, bias: float) -> None:
    """Blocks of sinks alone send nothing; also where all logits are so large that their exponential is infinite."""
    from cache_hub.eviction.blocked_kernels import triton_solve

    query, key = inputs(2, 1, 64, 300, torch.bfloat16)
    query[..., 1] = key[..., 1] = bias
    for sink_size in (64, 100, 128, 256, 299):
        shift = torch_log_sums(query.double(), key.double(), 0.2)[1]
        shift[..., :sink_size] = torch.inf
        expected = torch.full((2, 2, 1, 300), 0.01, dtype=torch.float64)
        found = expected.float().to(device)
        triton_solve(query.to(device), key.to(device), shift.float().to(device), found, 0.2, sink_size)
        torch_solve(query.double(), key.double(), shift, expected, 0.2, sink_size)
        # Logits of 320 in float32.
        torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "n"), SHAPES)
def test_received(device: str, heads: int, kv_heads: int, dim: int, n: int, dtype: torch.dtype) -> None:
    from cache_hub.eviction.blocked_kernels import triton_received

    query, key = inputs(heads, kv_heads, dim, n, dtype)
    logits = query.double() @ key.double().repeat_interleave(heads // kv_heads, 1).mT * 0.2
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    expected = logits.masked_fill(future, -torch.inf).softmax(-1).sum(2)
    total = logits.masked_fill(future, -torch.inf).logsumexp(-1).float()
    found = triton_received(query.to(device), key.to(device), total.to(device), 0.2)
    assert found.shape == (2, heads, 1, n)
    torch.testing.assert_close(found[:, :, 0].cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "bias"), [(1, 0.0), (64, 40.0), (100, 40.0)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "n"), [(3, 1, 64, 257), (3, 3, 80, 130)])
def test_the_last_rows_alone(
    device: str, heads: int, kv_heads: int, dim: int, n: int, window: int, bias: float
) -> None:
    """Their sums, and what two kinds of givers among them give to the tokens before and to all; also where all logits
    are so large that their exponential is infinite. Rows whose numbers do not lie side by side, too."""
    from cache_hub.eviction.blocked_kernels import triton_log_sums, triton_received

    query, key = (part.mT.contiguous().mT for part in inputs(heads, kv_heads, dim, n, torch.bfloat16))
    query[..., 1] = key[..., 1] = bias
    total, others = torch_log_sums(query.double(), key.double(), 0.2)
    logits = query.double() @ key.double().repeat_interleave(heads // kv_heads, 1).mT * 0.2
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    rows = logits.masked_fill(future, -torch.inf).softmax(-1)[:, :, -window:]
    sums = triton_log_sums(query.to(device), key.to(device), 0.2, n - window)
    for found, expected in zip(sums, (total, others), strict=True):
        torch.testing.assert_close(found.cpu().double(), expected[..., -window:], rtol=1e-4, atol=1e-4)
    given = torch.rand(2, heads, 2, window, generator=torch.Generator().manual_seed(0))
    for columns in (n - window, n):
        found = triton_received(query.to(device), key.to(device), sums[0], 0.2, given.to(device), columns)
        expected = (given.double() @ rows)[..., :columns]
        torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "n", "dtype"), [(3, 1, 64, 63, torch.bfloat16), (2, 2, 128, 131, torch.float32)]
)
def test_the_public_functions_by_kernels(
    device: str,
    heads: int,
    kv_heads: int,
    dim: int,
    n: int,
    gamma: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The exact chain with and without its log-sum-exp, the window's, and the attention that tokens receive, as on a
    GPU, against those of float64 in torch."""
    states = inputs(heads, kv_heads, dim, n, dtype)
    laid_out, window = [part.transpose(1, 2) for part in states], 9
    lse = causal_log_sum_exp(*(part.double() for part in states)).float()
    starts = ("query", "uniform", "window")
    given = {"sink_size": 4, "gamma": gamma, "window": window}
    exact = blocked_chain_scores(*(part.double() for part in states), start=starts, **given)
    observed = [window_chain_scores(*(part.double() for part in laid_out), start, **given) for start in starts]
    received = received_mass(*(part.double() for part in laid_out))
    for module in (attention, blocked, surrogate):
        monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")
    query, key = (part.to(device) for part in states)
    for known, rtol in ((None, 1e-4), (lse.to(device), 3e-3)):
        found = blocked_chain_scores(query, key, known, starts, **given)
        torch.testing.assert_close(found.cpu().double(), exact, rtol=rtol, atol=1e-6)
    query, key = (part.to(device) for part in laid_out)
    for start, expected in zip(starts, observed, strict=True):
        found = window_chain_scores(query, key, start, **given)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(received_mass(query, key).cpu(), received, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (8, 2, 128)])
def test_long_prompts(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    """All of the public functions, 3,001 tokens, both backends against float64."""
    query, key = (part.cuda() for part in inputs(heads, kv_heads, dim, 3001, dtype))
    exact = query.double(), key.double()
    lse = causal_log_sum_exp(*exact)
    for backend in ("auto", "triton", "torch"):
        for given in (None, lse.float()):
            for options in ({}, {"gamma": 0.9, "probability": True}, {"temperature": 2.0}):
                starts = ("query", "uniform", "window")
                found = blocked_chain_scores(query, key, given, starts, backend=backend, **options)
                expected = blocked_chain_scores(*exact, None, starts, **options)
                torch.testing.assert_close(
                    found.double(), expected, rtol=3e-3 if given is not None else 1e-4, atol=1e-7
                )
