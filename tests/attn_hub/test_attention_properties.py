"""Properties that the reference and the kernels share (algorithms 1.3 and 9.2)."""

import math

import pytest
import torch
from attention_cases import move, plain_attention, random_ids, random_store, written_out_attention

from attn_hub import WeightedPart

B, HKV, G, D = 2, 2, 3, 64
H = HKV * G


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _query(dtype=torch.float32):
    return torch.randn(B, 1, H, D).to(dtype)


def _run(attention, query, parts, scale=None):
    return attention(query.to(attention.device), move(parts, attention.device), scale).cpu()


def _close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def _mixed_parts():
    keys, values = random_store(B, HKV, 127, D), random_store(B, HKV, 127, D)
    return [
        WeightedPart(
            random_store(B, HKV, 70, D), random_store(B, HKV, 70, D), lengths=torch.tensor([[70, 0], [3, 65]])
        ),
        WeightedPart(keys, values, random_ids(127, B, HKV, 90), torch.randn(B, H, 90)),
        WeightedPart(keys, values, random_ids(127, B, H, 33, dtype=torch.int64)),
        WeightedPart(keys[:, :, :0], values[:, :, :0]),
    ]


def test_mixed_parts_equal_the_formula_in_float64(attention):
    query, parts = _query(), _mixed_parts()
    _close(_run(attention, query, parts), written_out_attention(query, parts), 2e-6)
    _close(_run(attention, query, parts, scale=0.5), written_out_attention(query, parts, scale=0.5), 5e-6)


@pytest.mark.parametrize("sizes", [[100], [1, 99], [64, 0, 36], [1, 1, 1, 97], [33, 34, 33], [0, 100]])
def test_any_partition_of_the_tokens_equals_plain_attention(attention, sizes):
    query, keys, values = _query(), random_store(B, HKV, 100, D), random_store(B, HKV, 100, D)
    shuffled = torch.randperm(100, dtype=torch.int32)
    by_slice = [WeightedPart(k, v) for k, v in zip(keys.split(sizes, 2), values.split(sizes, 2), strict=True)]
    by_id = [WeightedPart(keys, values, ids.expand(B, HKV, -1)) for ids in shuffled.split(sizes)]
    expected = plain_attention(query, keys, values)
    _close(_run(attention, query, by_slice), expected)
    _close(_run(attention, query, by_id), expected)


def test_more_parts_than_one_merge_block(attention):
    query, keys, values = _query(), random_store(B, HKV, 40, D), random_store(B, HKV, 40, D)
    parts = [WeightedPart(k, v) for k, v in zip(keys.split(1, 2), values.split(1, 2), strict=True)]
    _close(_run(attention, query, parts), plain_attention(query, keys, values))


def test_order_of_parts_and_rows_does_not_matter(attention):
    query, parts = _query(), _mixed_parts()
    expected = _run(attention, query, parts)
    _close(_run(attention, query, parts[::-1]), expected)
    order = torch.randperm(90)
    parts[1] = WeightedPart(
        parts[1].keys, parts[1].values, parts[1].ids[..., order].contiguous(), parts[1].log_weights[..., order]
    )
    _close(_run(attention, query, parts), expected)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("rows", [1, 63, 127])
def test_stand_ins_take_tokens_off_their_clusters(attention, rows, group):
    """The same as if each cluster had never held the tokens that are attended to exactly."""
    kv_heads, clusters = 2, max(rows // 5, 1)
    query = torch.randn(B, 1, kv_heads * group, D)
    keys, values = random_store(B, kv_heads, rows, D), random_store(B, kv_heads, rows, D)
    cluster_of = torch.randint(0, clusters, (B, kv_heads, rows), dtype=torch.int32)
    ids = torch.full((B, kv_heads, rows), -1, dtype=torch.int32)
    for b in range(B):
        for h in range(kv_heads):
            ids[b, h, : rows // 2] = torch.randperm(rows)[: rows // 2]
    lost = torch.zeros(B, kv_heads, rows, dtype=torch.bool)
    for b in range(B):
        for h in range(kv_heads):
            lost[b, h, ids[b, h][ids[b, h] >= 0].long()] = True
    centroids, sums, left = (torch.zeros(B, kv_heads, clusters, D) for _ in range(3))
    sizes, kept = torch.zeros(2, B, kv_heads, clusters)
    at = cluster_of.long()
    for table, source in ((centroids, keys), (sums, values), (left, values * ~lost[..., None])):
        table.scatter_add_(2, at[..., None].expand_as(source), source)
    sizes.scatter_add_(2, at, torch.ones_like(lost, dtype=torch.float32))
    kept.scatter_add_(2, at, (~lost).float())
    centroids /= sizes.clamp(min=1)[..., None]
    exact = WeightedPart(keys, values, ids)
    reduced = WeightedPart(centroids, left / kept.clamp(min=1)[..., None], log_weights=kept.log())
    expected = written_out_attention(query, [exact, reduced])
    others = torch.where(ids >= 0, cluster_of.gather(2, ids.clamp(min=0).long()), -1)
    whole = WeightedPart(centroids, sums / sizes.clamp(min=1)[..., None], log_weights=sizes.log())
    parts = [whole, WeightedPart(keys, values, ids, stand_ins=centroids, stand_in_ids=others)]
    _close(_run(attention, query, parts), expected, 5e-6)
    _close(written_out_attention(query, parts), expected, 1e-6)
    # As if no token belonged to a cluster.
    parts[1].stand_in_ids = torch.full_like(others, -1)
    _close(_run(attention, query, parts), written_out_attention(query, [whole, exact]), 2e-6)


def test_a_cluster_row_of_equal_keys_counts_as_its_tokens(attention):
    query, sizes = _query(), [1, 5, 30]
    centroids = random_store(B, HKV, len(sizes), D)
    keys = centroids.repeat_interleave(torch.tensor(sizes), dim=2)
    values = random_store(B, HKV, sum(sizes), D)
    means = torch.stack([part.mean(2) for part in values.split(sizes, 2)], dim=2)
    clusters = WeightedPart(centroids, means, log_weights=torch.tensor(sizes).float().log())
    _close(_run(attention, query, [clusters]), plain_attention(query, keys, values))


@pytest.mark.parametrize("shape", [(), (40,), (1, 1, 40), (H, 1), (B, 1, 1), (1, H, 40), (B, H, 40), (B, HKV, 40)])
@pytest.mark.parametrize("per_query_head", [False, True])
def test_log_weights_broadcast(attention, shape, per_query_head):
    query, weights = _query(), torch.randn(shape)
    keys, values = random_store(B, HKV, 60, D), random_store(B, HKV, 60, D)
    other = WeightedPart(random_store(B, HKV, 5, D), random_store(B, HKV, 5, D))
    parts = [WeightedPart(keys, values, random_ids(60, B, H if per_query_head else HKV, 40), weights), other]
    _close(_run(attention, query, parts), written_out_attention(query, parts), 2e-6)


def test_nothing_to_attend_to_gives_zeros(attention):
    keys, values = random_store(B, HKV, 40, D), random_store(B, HKV, 40, D)
    nothing = [
        WeightedPart(keys[:, :, :0], values[:, :, :0]),
        WeightedPart(keys, values, torch.full((B, HKV, 70), -1, dtype=torch.int32)),
        WeightedPart(keys, values, torch.empty(B, H, 0, dtype=torch.int32)),
        WeightedPart(keys, values, lengths=torch.zeros(B, HKV, dtype=torch.int32)),
        WeightedPart(keys[:, :, :0], values[:, :, :0], torch.full((B, H, 3), -1, dtype=torch.int32)),
        WeightedPart(keys, values, log_weights=torch.tensor(-math.inf)),
    ]
    query = _query()
    for parts in [*([part] for part in nothing), nothing]:
        assert torch.equal(_run(attention, query, parts), torch.zeros_like(query))
    some = WeightedPart(keys, values)
    _close(_run(attention, query, [nothing[1], some, *nothing]), plain_attention(query, keys, values))


def test_one_kv_head_may_be_empty_while_others_are_not(attention):
    query, keys, values = _query(), random_store(B, HKV, 9, D), random_store(B, HKV, 9, D)
    out = _run(attention, query, [WeightedPart(keys, values, lengths=torch.tensor([[0, 9], [9, 9]]))])
    assert torch.equal(out[0, :, :G], torch.zeros(1, G, D))
    _close(out[0, :, G:], plain_attention(query, keys, values)[0, :, G:])


def test_a_single_row_returns_its_value(attention):
    values = random_store(B, HKV, 50, D)
    part = WeightedPart(random_store(B, HKV, 50, D), values, torch.full((B, HKV, 1), 7), torch.tensor(3.0))
    assert torch.equal(_run(attention, _query(), [part]), values[:, :, 7].repeat_interleave(G, 1).unsqueeze(1))


def test_unnamed_rows_may_hold_nan(attention):
    query, keys, values = _query(), random_store(B, HKV, 30, D), random_store(B, HKV, 30, D)
    expected = plain_attention(query, keys[:, :, 10:20], values[:, :, 10:20])
    keys[:, :, :10], values[:, :, :10] = math.nan, math.nan
    ids = torch.cat([torch.full((5,), -1), torch.arange(10, 20)]).expand(B, HKV, -1)
    keys[:, :, 20:], values[:, :, 20:] = math.nan, math.inf
    _close(_run(attention, query, [WeightedPart(keys, values, ids)]), expected)
    keys[0, 1, 19], values[0, 1, 19] = math.nan, math.nan
    lengths = torch.tensor([[10, 9], [10, 10]])
    out = _run(attention, query, [WeightedPart(keys[:, :, 10:], values[:, :, 10:], lengths=lengths)])
    assert not out.isnan().any()
    _close(out[1], expected[1])


def test_nan_in_a_named_row_is_not_hidden(attention):
    keys, values = random_store(B, HKV, 100, D), random_store(B, HKV, 100, D)
    keys[0, 0, 3, 0] = math.nan
    out = _run(attention, _query(), [WeightedPart(keys, values)])
    assert out[0, :, :G].isnan().all()
    assert not out[1].isnan().any()


def test_logits_far_apart_do_not_overflow(attention):
    query, keys, values = _query(), random_store(B, HKV, 130, D), random_store(B, HKV, 130, D)
    parts = [
        WeightedPart(keys, values, log_weights=torch.tensor(-1e3)),
        WeightedPart(keys * 10, values, log_weights=torch.tensor(1e3)),
    ]
    _close(_run(attention, query, parts), written_out_attention(query, parts), 1e-3)


def test_stores_of_any_row_stride_are_read_in_place(attention):
    query = _query()
    padded = torch.randn(B, HKV, 90, D + 7)[:, 1:, 5:70, 3 : D + 3].expand(B, HKV, 65, D)
    token_major = torch.randn(B, 65, HKV, D).transpose(1, 2)
    ids = random_ids(65, B, HKV, 30)
    for keys, values in ((padded, token_major), (token_major, padded)):
        for parts in ([WeightedPart(keys, values)], [WeightedPart(keys, values, ids)]):
            _close(_run(attention, query, parts), written_out_attention(query, parts), 2e-6)


def test_result_has_the_dtype_of_the_query(attention):
    for query_dtype in (torch.float32, torch.bfloat16, torch.float16):
        for store_dtype in (torch.float32, torch.bfloat16, torch.float16):
            query = _query(query_dtype)
            parts = [WeightedPart(*(random_store(B, HKV, 10, D, store_dtype) for _ in range(2)))]
            out = _run(attention, query, parts)
            assert out.dtype == query_dtype
            _close(out, written_out_attention(query, parts), 2e-6 if query_dtype == torch.float32 else 1e-2)
