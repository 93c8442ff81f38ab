"""SoftmaxLift's sample is unbiased for both sums of the softmax, and exact where everything is drawn."""

import pytest
import torch

from cache_hub.index import make_index
from cache_hub.lift import SoftmaxLift


def lifted(keys: torch.Tensor, group: int, seed: int) -> SoftmaxLift:
    lift = SoftmaxLift(make_index("flat"), len(keys), seed)
    lift.build(keys, torch.zeros(len(keys), group, 1, keys.shape[2]))
    return lift


@pytest.mark.parametrize("group", [1, 3])
def test_numerator_and_denominator_are_unbiased(group: int) -> None:
    """z-scores of the mean over draws against the exact sums; a group shares one sample of its union."""
    torch.manual_seed(1)
    rows, n, dim, k, draws = 1, 400, 16, 24, 1500
    keys, values, queries = torch.randn(rows, n, dim), torch.randn(rows, n, 2), torch.randn(rows, group, dim)
    weights = (queries @ keys.transpose(1, 2) / dim**0.5).exp()[0]
    exact = torch.cat((weights.sum(-1, keepdim=True), weights @ values[0]), 1)
    estimates = []
    for seed in range(draws):
        sample, _ = lifted(keys, group, seed).search(queries, k)
        ids = sample.ids[0][sample.ids[0] >= 0].long()
        counted = weights[:, ids] * sample.log_weights[0][sample.ids[0] >= 0].exp()
        estimates.append(torch.cat((counted.sum(-1, keepdim=True), counted @ values[0, ids]), 1))
    drawn = torch.stack(estimates).double()
    z = (drawn.mean(0) - exact) / (drawn.std(0) / draws**0.5)
    print(f"z-scores, g = {group}: {z.flatten().tolist()}")
    assert z.abs().max() < 4


def test_as_many_draws_as_keys_are_exact() -> None:
    torch.manual_seed(0)
    keys = torch.randn(2, 30, 64)
    sample, found = lifted(keys, 3, 0).search(torch.randn(2, 3, 64), 30)
    assert sample.ids.shape == (2, 90)
    assert [sorted(row[row >= 0].tolist()) for row in sample.ids] == [list(range(30))] * 2
    assert bool((sample.log_weights == 0).all())
    assert found.ids.shape == (2, 3, 30)


def test_equal_keys_weigh_n_over_k_in_expectation() -> None:
    keys, total = torch.ones(1, 200, 64), []
    for seed in range(400):
        sample, _ = lifted(keys, 1, seed).search(torch.ones(1, 1, 64), 20)
        total.append(sample.log_weights[sample.ids >= 0].exp().sum())
    mean, error = torch.stack(total).mean(), torch.stack(total).std() / 20
    assert abs(mean - 200) < 4 * error


def test_the_same_seed_draws_the_same() -> None:
    keys, query = torch.randn(1, 100, 64), torch.randn(1, 3, 64)
    first, again, other = (lifted(keys, 3, seed).search(query, 10)[0] for seed in (5, 5, 6))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)


def test_no_token_is_named_twice() -> None:
    keys = torch.randn(2, 100, 64)
    sample, _ = lifted(keys, 4, 0).search(torch.randn(2, 1, 64).expand(2, 4, 64), 10)
    for row in sample.ids:
        named = row[row >= 0].tolist()
        assert len(named) == len(set(named)) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["flat", "attention_aware_graph", "ivf", "hnsw"])
def test_an_extra_dimension_is_as_if_the_keys_had_it(strategy: str, dtype: torch.dtype) -> None:
    """Where everything is searched: ids and scores of keys one dimension longer, and queries that end with a 1."""
    everything = {
        "flat": {},
        "attention_aware_graph": {"ef_search": 150, "index_dtype": "auto"},
        "ivf": {"n_probe": 150},
        "hnsw": {"m": 150, "ef_construction": 150, "ef_search": 150},
    }
    torch.manual_seed(0)
    keys, queries = torch.randn(2, 150, 64).to(dtype), torch.randn(2, 3, 200, 64)
    extra, positions = 5 * torch.rand(2, 150), torch.arange(200)
    index = make_index(strategy, **everything[strategy])
    index.build(keys, queries, positions, extra)
    found = index.search(queries[:, :, -1], 20)
    scores = (queries[:, :, -1] @ keys.float().transpose(1, 2) + extra[:, None]).topk(20)
    torch.testing.assert_close(found.scores, scores.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.ids.long().sort(-1).values, scores.indices.sort(-1).values)


@pytest.mark.parametrize("extra", [torch.zeros(2, 149), torch.zeros(2, 150).double()])
def test_an_extra_dimension_that_does_not_fit_is_refused(extra: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"extra: got .*, allowed: torch.float32 \(2, 150\)"):
        make_index("flat").build(torch.randn(2, 150, 64), torch.randn(2, 1, 1, 64), None, extra)


def test_the_sample_costs_four_bytes_a_token_beside_the_index() -> None:
    lift = lifted(torch.randn(2, 100, 64).bfloat16(), 1, 0)
    assert lift.nbytes == 2 * 100 * 4


def test_a_sequence_draws_the_same_in_any_batch() -> None:
    keys, query = torch.randn(4, 100, 64), torch.randn(4, 3, 64)
    both, alone = (SoftmaxLift(make_index("flat"), 2, 0) for _ in range(2))
    both.build(keys, torch.zeros(4, 3, 1, 64))
    alone.build(keys[2:], torch.zeros(2, 3, 1, 64))
    assert torch.equal(both.search(query, 10)[0].ids[2:], alone.search(query[2:], 10)[0].ids)
