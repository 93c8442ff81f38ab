"""What only the torch reference offers: log-sum-exps, merging, range checks, reading few rows of a large store."""

import math

import pytest
import torch
from attention_cases import plain_attention, random_ids, random_store

from attn_hub import WeightedPart, weighted_decode_attention
from attn_hub.reference import merge_partials, partial_attention, reference_weighted_decode_attention

B, HKV, G, D = 2, 2, 3, 64
H = HKV * G


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _part(rows: int, **fields) -> WeightedPart:
    return WeightedPart(random_store(B, HKV, rows, D), random_store(B, HKV, rows, D), **fields)


def test_partial_attention_gives_the_log_sum_exp():
    query, part = torch.randn(B, 1, H, D), _part(50, log_weights=torch.randn(B, H, 50))
    out, lse = partial_attention(query, part)
    keys = part.keys.double().repeat_interleave(G, 1)
    logits = torch.einsum("bhd,bhnd->bhn", query[:, 0].double(), keys) / D**0.5 + part.log_weights.double()
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-5, rtol=1e-6)
    assert out.dtype == lse.dtype == torch.float32
    expected = reference_weighted_decode_attention(query, [part])[:, 0]
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


def test_an_empty_part_has_lse_minus_infinity_and_out_zero():
    for part in (_part(0), _part(9, ids=torch.full((B, HKV, 4), -1)), _part(9, lengths=torch.zeros(B, HKV).int())):
        out, lse = partial_attention(torch.randn(B, 1, H, D), part)
        assert torch.equal(out, torch.zeros(B, H, D))
        assert torch.equal(lse, torch.full((B, H), -math.inf))


def test_merged_partials_equal_one_softmax():
    query = torch.randn(B, 1, H, D)
    parts = [
        _part(0),
        _part(30, ids=random_ids(30, B, H, 20)),
        _part(1),
        _part(40, lengths=torch.tensor([[0, 40]] * B)),
    ]
    outs, lses = zip(*(partial_attention(query, part) for part in parts), strict=True)
    out, lse = merge_partials(outs, lses)
    expected = reference_weighted_decode_attention(query, parts)[:, 0]
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, torch.stack(lses).logsumexp(0))


def test_merging_only_empty_partials_gives_zeros():
    out, lse = merge_partials([torch.zeros(B, H, D)] * 2, [torch.full((B, H), -math.inf)] * 2)
    assert torch.equal(out, torch.zeros(B, H, D))
    assert torch.equal(lse, torch.full((B, H), -math.inf))


def test_cpu_queries_take_the_reference():
    query, parts = torch.randn(B, 1, H, D), [_part(20)]
    assert torch.equal(weighted_decode_attention(query, parts), reference_weighted_decode_attention(query, parts))


@pytest.mark.parametrize("ids", [[-2, 0], [0, 10], [0, 2**31 - 1]])
def test_ids_out_of_range_are_named(ids):
    part = _part(10, ids=torch.tensor(ids).expand(B, HKV, 2))
    with pytest.raises(IndexError, match=rf"ids range over \[{min(ids)}, {max(ids)}\], must lie in \[-1, 9\]"):
        weighted_decode_attention(torch.randn(B, 1, H, D), [part])


@pytest.mark.parametrize("length", [-1, 11])
def test_lengths_out_of_range_are_named(length):
    part = _part(10, lengths=torch.tensor([[5, length], [5, 5]]))
    with pytest.raises(ValueError, match=rf"lengths range over .*{length}.*must lie in \[0, 10\]"):
        weighted_decode_attention(torch.randn(B, 1, H, D), [part])


def test_only_named_rows_of_a_store_are_copied():
    """A store of 2^40 rows, one row of memory repeated: any copy of it would not fit."""
    query = torch.randn(B, 1, H, D)
    keys, values = (random_store(B, HKV, 1, D).expand(B, HKV, 2**40, D) for _ in range(2))
    far = torch.tensor([0, 2**40 - 1, -1]).expand(B, HKV, -1)
    lengths = torch.full((B, HKV), 3)
    expected = plain_attention(query, keys[:, :, :1], values[:, :, :1])
    for part in (WeightedPart(keys, values, far), WeightedPart(keys, values, lengths=lengths)):
        out = weighted_decode_attention(query, [part])
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-6)
