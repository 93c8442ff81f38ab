"""Triton kernels of a decode step's hand-overs: a token into a store that counts its rows, a query to the host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def append_token_kernel(  # type: ignore[no-untyped-def]
    keys, values, lengths, key, value, kv_heads,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_lb, stride_lh,
    stride_ab, stride_ah,
    stride_cb, stride_ch,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one kv head of one sequence."""
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    ok = dim < HEAD_DIM
    count = lengths + batch * stride_lb + head * stride_lh
    at = tl.load(count)
    row = at.to(tl.int64)
    k = tl.load(key + batch * stride_ab + head * stride_ah + dim, mask=ok)
    v = tl.load(value + batch * stride_cb + head * stride_ch + dim, mask=ok)
    tl.store(keys + batch * stride_kb + head * stride_kh + row * stride_kn + dim, k, mask=ok)
    tl.store(values + batch * stride_vb + head * stride_vh + row * stride_vn + dim, v, mask=ok)
    tl.store(count, at + 1)


@triton.jit
def post_kernel(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: BLOCK numbers, in the target's type."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count).to(target.dtype.element_ty), mask=at < count)


def triton_append_token(keys: Tensor, values: Tensor, lengths: Tensor, key: Tensor, value: Tensor) -> None:
    """`attn_hub.append_token` by the kernel."""
    batch, kv_heads, _, head_dim = keys.shape
    key, value = key[:, 0], value[:, 0]
    with torch.cuda.device_of(keys):
        append_token_kernel[(batch * kv_heads,)](
            keys, values, lengths, key, value, kv_heads,
            *keys.stride()[:3],
            *values.stride()[:3],
            *lengths.stride(),
            *key.stride()[:2],
            *value.stride()[:2],
            HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=1,
        )  # fmt: skip


def triton_post(source: Tensor, target: Tensor) -> None:
    """`attn_hub.post` by the kernel, which writes to host memory by itself."""
    count = source.numel()
    with torch.cuda.device_of(source):
        post_kernel[(triton.cdiv(count, _BLOCK),)](source.contiguous(), target, count, BLOCK=_BLOCK)
