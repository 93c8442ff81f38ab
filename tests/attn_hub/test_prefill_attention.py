"""Dense prefill attention against a softmax written out in float64."""

import pytest
import torch

from attn_hub import full_prefill_attn

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def _softmax_attention(q, k, v, causal):
    group, queries, keys = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) * q.shape[3] ** -0.5
    if causal:
        seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def _inputs(queries, keys, group, dtype=torch.float32, head_dim=64):
    torch.manual_seed(queries + keys)
    shapes = ((queries, 2 * group), (keys, 2), (keys, 2))
    return [torch.randn(2, rows, heads, head_dim).to(dtype) for rows, heads in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(1, 1, True), (65, 65, True), (65, 65, False), (30, 65, False)]
)
def test_equals_a_plain_softmax(device, dtype, group, queries, keys, causal):
    q, k, v = _inputs(queries, keys, group, dtype)
    out = full_prefill_attn(q.to(device), k.to(device), v.to(device), causal=causal).cpu()
    assert out.dtype == dtype
    assert out.shape == q.shape
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), _softmax_attention(q, k, v, causal), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (33, 65), (64, 65), (1030, 1100)])
def test_fewer_queries_than_keys_are_aligned_at_the_end(device, group, queries, keys):
    q, k, v = (x.to(device) for x in _inputs(queries, keys, group, head_dim=16))
    out = full_prefill_attn(q, k, v)
    torch.testing.assert_close(
        out.double().cpu(), _softmax_attention(q.cpu(), k.cpu(), v.cpu(), True), atol=1e-5, rtol=1e-5
    )


def test_chunks_of_a_prompt_equal_the_whole():
    q, k, v = _inputs(70, 70, 3)
    chunks = [full_prefill_attn(q[:, a:b], k[:, :b], v[:, :b]) for a, b in ((0, 32), (32, 33), (33, 70))]
    torch.testing.assert_close(torch.cat(chunks, 1), full_prefill_attn(q, k, v), atol=1e-5, rtol=1e-5)


def test_wrong_inputs_are_named():
    q, k, v = _inputs(5, 5, 2)
    with pytest.raises(ValueError, match=r"5 queries over 4 keys: causal attention needs Lq <= Lk"):
        full_prefill_attn(q, k[:, :4], v[:, :4])
    with pytest.raises(ValueError, match=r"v is \[2, 4, 2, 64\], must have the shape of k \[2, 5, 2, 64\]"):
        full_prefill_attn(q, k, v[:, :4])
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 kv heads"):
        full_prefill_attn(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match=r"q \[2, 5, 4\] and k \[2, 5, 2, 64\] must be"):
        full_prefill_attn(q[..., 0], k, v)
    with pytest.raises(ValueError, match="must agree"):
        full_prefill_attn(q.half(), k, v)
