"""Triton kernel of the rotary embedding: one launch for all heads of all tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["length"])
def rotate_kernel(  # type: ignore[no-untyped-def]
    states, cos, sin, out, length, heads,
    stride_sb, stride_sl, stride_sh,
    stride_cb, stride_cl,
    stride_ob, stride_ol, stride_oh,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one token. Every product and sum is rounded to the states' dtype, as torch's operations are."""
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    head = tl.arange(0, BLOCK_H)
    ok = (head < heads)[:, None] & (dim < HALF)[None, :]
    angle = batch * stride_cb + token * stride_cl + dim
    c = tl.load(cos + angle, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
    source = states + batch * stride_sb + token * stride_sl + head[:, None] * stride_sh + dim[None, :]
    first = tl.load(source, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=ok, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    left = (first * c).to(dtype).to(tl.float32) - (second * s).to(dtype).to(tl.float32)
    right = (second * c).to(dtype).to(tl.float32) + (first * s).to(dtype).to(tl.float32)
    target = out + batch * stride_ob + token * stride_ol + head[:, None] * stride_oh + dim[None, :]
    tl.store(target, left.to(dtype), mask=ok)
    tl.store(target + HALF, right.to(dtype), mask=ok)


def triton_rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`attn_hub.rotate` by the kernel."""
    batch, length, heads, head_dim = states.shape
    out = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    cos, sin = (table.expand(batch, length, 1, head_dim // 2) for table in (cos, sin))
    with torch.cuda.device_of(states):
        rotate_kernel[(batch * length,)](
            states, cos, sin, out, length, heads,
            *states.stride()[:3],
            *cos.stride()[:2],
            *out.stride()[:3],
            HALF=head_dim // 2, BLOCK_H=triton.next_power_of_2(heads),
            BLOCK_D=triton.next_power_of_2(head_dim // 2),
            enable_fp_fusion=False,  # a product that a sum takes in unrounded is not torch's
        )  # fmt: skip
    return out
