"""Chain scores from queries and keys against the dense ones, and selections in fewer bits against float64."""

import pytest
import torch
from chain_cases import dense_attention, overlap, queries_and_keys

from cache_hub.eviction import blocked_reference
from cache_hub.eviction.blocked import blocked_chain_scores, causal_log_sum_exp, self_transitions
from cache_hub.eviction.chain import absorbing_chain_scores, compute_transition_matrix, visit_probabilities

STARTS = ("query", "uniform", "window")
SHAPES = [(2, 2, 64, 5), (6, 2, 64, 63), (4, 1, 128, 127), (3, 3, 128, 63)]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, NEEDS_GPU))]


@pytest.fixture(params=[1 << 24, 700], ids=["long-tiles", "short-tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of keys that hold a row of blocks, and such that cut it at odd places."""
    monkeypatch.setattr(blocked_reference, "_TILE", request.param)


@pytest.fixture(params=[3, 7, 256])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows solved together; hardly any of the lengths is a multiple."""
    monkeypatch.setattr(blocked_reference, "_BLOCK", request.param)


@pytest.mark.usefixtures("tiles", "block")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "n"), SHAPES)
def test_blocked_is_dense(heads: int, kv_heads: int, head_dim: int, n: int) -> None:
    query, key = (part.expand(2, -1, -1, -1).clone() for part in queries_and_keys(n, heads, kv_heads, head_dim, 3.0))
    query[1] = query[1].flip(1)
    attention = dense_attention(query, key)
    lse = causal_log_sum_exp(query, key)
    window = min(9, n - 4)
    for start in (*STARTS, torch.rand(2, heads, n, generator=torch.Generator().manual_seed(0)).double()):
        for gamma in (1.0, 0.7):
            expected = absorbing_chain_scores(attention, start, 4, 1.0, gamma, window)
            for known in (lse, None):
                found = blocked_chain_scores(query, key, known, start, 4, gamma, window)
                torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.usefixtures("tiles", "block")
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_has_a_normaliser_of_its_own(temperature: float) -> None:
    query, key = queries_and_keys(63, 6, 2)
    expected = absorbing_chain_scores(dense_attention(query, key), "uniform", 4, temperature)
    lse = causal_log_sum_exp(query, key)
    for given in (lse, None):
        found = blocked_chain_scores(query, key, given, "uniform", temperature=temperature)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-15)
    hot = causal_log_sum_exp(query, key, temperature)
    matrix = compute_transition_matrix(dense_attention(query, key), temperature)
    diagonal = self_transitions(query, key, hot, temperature)
    torch.testing.assert_close(diagonal, matrix.diagonal(dim1=2, dim2=3), rtol=1e-12, atol=0)


@pytest.mark.usefixtures("tiles", "block")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "n"), SHAPES)
def test_log_sum_exp(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, n: int) -> None:
    query, key = (part.to(dtype) for part in queries_and_keys(n, heads, kv_heads, head_dim, 3.0))
    repeated = key.double().repeat_interleave(heads // kv_heads, 1)
    logits = query.double() @ repeated.mT / head_dim**0.5
    expected = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).logsumexp(-1)
    found = causal_log_sum_exp(query, key)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("probability", [False, True])
def test_several_starts_share_a_pass(probability: bool) -> None:
    query, key = queries_and_keys(63, 6, 2)
    given = {"window": 9, "gamma": 0.9, "probability": probability}
    both = blocked_chain_scores(query, key, start=("query", "uniform", "window"), **given)
    assert both.shape == (1, 6, 3, 63)
    for at, start in enumerate(("query", "uniform", "window")):
        torch.testing.assert_close(both[:, :, at], blocked_chain_scores(query, key, start=start, **given))


def test_probabilities_are_visits_without_the_loops() -> None:
    query, key = queries_and_keys(63, 6, 2)
    loops = self_transitions(query, key, causal_log_sum_exp(query, key))
    for gamma in (1.0, 0.8):
        visits = blocked_chain_scores(query, key, start="uniform", gamma=gamma)
        found = blocked_chain_scores(query, key, start="uniform", gamma=gamma, probability=True)
        torch.testing.assert_close(found, visit_probabilities(visits, loops, 4, gamma), rtol=1e-11, atol=1e-15)


def test_scale_and_strided_inputs() -> None:
    """Queries and keys as a projection lays them out, [B, n, heads, D], and a scale other than D^-0.5."""
    query, key = queries_and_keys(63, 4, 2)
    laid_out = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key)]
    expected = absorbing_chain_scores(dense_attention(query * 8 * 0.2, key), "uniform")
    found = blocked_chain_scores(laid_out[0], laid_out[1], start="uniform", scale=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.usefixtures("block")
def test_later_queries_and_keys_change_nothing() -> None:
    n, last = 63, 40
    query, key = queries_and_keys(n, 6, 2, seed=1)
    other_query, other_key = queries_and_keys(n, 6, 2, seed=2)
    other_query[:, :, : last + 1], other_key[:, :, : last + 1] = query[:, :, : last + 1], key[:, :, : last + 1]
    mass = torch.zeros(n, dtype=torch.float64)
    mass[last] = 1
    found = blocked_chain_scores(query, key, start=mass)
    torch.testing.assert_close(blocked_chain_scores(other_query, other_key, start=mass), found)
    alone = blocked_chain_scores(query[:, :, : last + 1], key[:, :, : last + 1])
    torch.testing.assert_close(found[..., : last + 1], alone, rtol=1e-12, atol=0)
    assert bool((found[..., last + 1 :] == 0).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sink", "sharp"), [(0.0, 0.3), (0.0, 1.0), (4.0, 1.0), (6.0, 2.0), (8.0, 3.0)])
def test_fewer_bits_select_the_same(device: str, dtype: torch.dtype, sink: float, sharp: float) -> None:
    """Of each head's best 64 and 256 of 1,000 tokens, the share that float64 chooses too, on the same rounded inputs
    and on the inputs before rounding."""
    query, key = queries_and_keys(1000, 4, 2, 64, sink, sharp)
    rounded = [part.to(dtype) for part in (query, key)]
    for start in STARTS:
        found = blocked_chain_scores(*(part.to(device) for part in rounded), start=start).cpu()
        assert found.dtype == torch.float32
        same = blocked_chain_scores(*(part.double() for part in rounded), start=start)
        before = blocked_chain_scores(query, key, start=start)
        for count in (64, 256):
            shares = [float(overlap(found, exact, count).mean()) for exact in (same, before)]
            print(f"{dtype} sink {sink} sharp {sharp} {start}, top {count}: {shares[0]:.4f}, before {shares[1]:.4f}")
            assert shares[0] >= 0.999
            assert shares[1] >= 0.99


@pytest.mark.parametrize(("sink", "sharp"), [(0.0, 0.3), (4.0, 1.0), (8.0, 3.0)])
def test_attention_of_fewer_bits_selects_the_same(sink: float, sharp: float) -> None:
    """Dense scores of rounded attention, float32 whatever its type: scores of bfloat16 would tie at the border."""
    attention = dense_attention(*queries_and_keys(1000, 4, 2, 64, sink, sharp))
    for start in STARTS:
        exact = absorbing_chain_scores(attention, start)
        for given in (attention.float(), attention.bfloat16().float(), attention.bfloat16()):
            share = float(overlap(absorbing_chain_scores(given, start), exact, 64).mean())
            print(f"{given.dtype} sink {sink} sharp {sharp} {start}: {share:.4f}")
            assert share >= 0.99


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("excess", [5.0, 12.0, 20.0, 40.0])
def test_tokens_that_attend_to_hardly_anything_else(excess: float, device: str) -> None:
    """What leaves them is far below what float32 has beside 1; heads of real models have such tokens."""
    query, key = queries_and_keys(63, 6, 2)
    # A token's own logit above those of all others by about `excess`.
    for token in (9, 30, 31):
        query[..., token, :] = 0
        query[..., token, 1] = 8.0
        key[..., 1] = torch.where(torch.arange(63) == token, key[..., 1] + excess, key[..., 1])
    query, key = (part.float() for part in (query, key))
    for start in ("query", "uniform"):
        expected = absorbing_chain_scores(dense_attention(query.double(), key.double()), start)
        found = blocked_chain_scores(query.to(device), key.to(device), start=start).cpu()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_singular_chain_names_its_token(dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(63, 6, 2)
    query[..., 1] = -1
    query[0, 4, 30, 1] = key[0, 1, 30, 1] = 300
    query, key = query.to(device, dtype), key.to(device, dtype)
    with pytest.raises(ValueError, match=r"token 30 is absorbing: Q\[30,30\] = 1 \(batch 0, head 4\)"):
        blocked_chain_scores(query, key)
    assert bool(blocked_chain_scores(query, key, gamma=0.9).isfinite().all())


@pytest.mark.parametrize("token", range(20, 32))
def test_a_singular_chain_is_seen_through_rounding(token: int) -> None:
    """A log-sum-exp summed in another order, here in float64, may lie above the token's logit for itself."""
    query, key = queries_and_keys(40, 2, 1)
    query[0, 0, token] = 6 * key[0, 0, token]
    key[0, 0, token] *= 3
    lse = causal_log_sum_exp(query.float().double(), key.float().double())
    with pytest.raises(ValueError, match=f"token {token} is absorbing"):
        blocked_chain_scores(query.float(), key.float(), lse)


def test_bad_input_is_told() -> None:
    query, key = queries_and_keys(20, 6, 2)
    nan = key.clone()
    nan[0, 1, 7, 3] = torch.nan
    with pytest.raises(ValueError, match="got NaN or infinity"):
        blocked_chain_scores(query, nan)
    for arguments, message in (
        ({"key": key[:, :, :19]}, r"key: got shape \[1, 2, 19, 64\]"),
        ({"key": key.repeat(1, 2, 1, 1)}, "a divisor of 6"),
        ({"key": key.float()}, "dtypes: got query torch.float64, key torch.float32"),
        ({"lse": torch.zeros(1, 6, 19)}, r"lse: got shape \[1, 6, 19\]"),
        (
            {"backend": "triton"},
            "backend: got 'triton' for torch.float64, rows of 64, on cpu, allowed there: 'auto', 'torch'",
        ),
        ({"gamma": 2.0}, "gamma: got 2.0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"sink_size": 20}, "sink_size: got 20, allowed: 1 to 19"),
        ({"start": "hub"}, "start: got 'hub'"),
        ({"start": ()}, "start: got none"),
    ):
        with pytest.raises(ValueError, match=message):
            blocked_chain_scores(**({"query": query, "key": key} | arguments))  # type: ignore[arg-type]
