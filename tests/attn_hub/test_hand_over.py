"""A token appended to a store that counts its rows, and a query handed to the host, in torch and by the kernels."""

import pytest
import torch
from attention_cases import KERNELS

from attn_hub import append_token, post


def _by(name: str):
    """append_token and post by the kernels on this device, or as they are without a GPU."""
    if name == "reference":
        return append_token, post, "cpu"
    pytest.importorskip("triton")
    from attn_hub.kernels.hand_over import triton_append_token, triton_post

    return triton_append_token, triton_post, "cuda" if name == "compiled" else "cpu"


@pytest.mark.parametrize("way", ["reference", KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "kv_heads", "head_dim"), [(1, 1, 64), (3, 2, 80), (2, 3, 128)])
def test_a_token_comes_behind_those_there(way, dtype, batch, kv_heads, head_dim):
    append, _, device = _by(way)
    torch.manual_seed(0)
    stores = [torch.randn(batch, kv_heads, 9, 2, head_dim).to(dtype).to(device)[:, :, :, i] for i in range(2)]
    lengths = torch.randint(0, 7, (batch, kv_heads), dtype=torch.int32)
    there = lengths.clone().to(device)
    expected = [store.cpu().clone() for store in stores]
    for _ in range(2):
        token = [torch.randn(batch, 1, kv_heads, 2, head_dim).to(dtype)[:, :, :, i] for i in range(2)]
        append(*stores, there, *(states.to(device) for states in token))
        for store, states in zip(expected, token, strict=True):
            for b in range(batch):
                for h in range(kv_heads):
                    store[b, h, int(lengths[b, h])] = states[b, 0, h]
        lengths += 1
    assert torch.equal(there.cpu(), lengths)
    for store, wanted in zip(stores, expected, strict=True):
        assert torch.equal(store.cpu(), wanted)


@pytest.mark.parametrize("way", ["reference", KERNELS])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 9, 64), (1, 1, 32, 128)])
def test_a_query_is_posted_as_float32(way, shape):
    _, hand, device = _by(way)
    query = torch.randn(shape).bfloat16()
    target = torch.full((query.numel(),), torch.nan, pin_memory=device == "cuda")
    hand(query.to(device), target)
    if device == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(target, query.float().flatten())


def test_what_does_not_fit_is_refused():
    store, token = torch.zeros(2, 3, 5, 64), torch.zeros(2, 1, 3, 64)
    lengths = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"got key \[2, 1, 3, 32\]"):
        append_token(store, store, lengths, token[..., :32], token)
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 and torch\.bfloat16, allowed: the stores'"):
        append_token(store, store, lengths, token.bfloat16(), token.bfloat16())
    with pytest.raises(ValueError, match=r"target: got \[383\]"):
        post(token, torch.zeros(383))
