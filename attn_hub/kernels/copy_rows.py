"""Triton kernel that copies rows by id, from GPU memory or straight from pinned host memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ROWS = 32


@triton.jit(do_not_specialize=["num_rows"])
def copy_rows_kernel(  # type: ignore[no-untyped-def]
    source, target, source_ids, target_ids, num_rows, kv_heads,
    stride_sb, stride_sh, stride_sn,
    stride_tb, stride_th, stride_tn,
    stride_ib, stride_ih, stride_it,
    stride_jb, stride_jh, stride_jt,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N entries of one (sequence, kv head)'s lists."""
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    listed = entry < num_rows
    dim = tl.arange(0, BLOCK_D)
    row = tl.load(source_ids + batch * stride_ib + head * stride_ih + entry * stride_it, mask=listed, other=-1)
    place = tl.load(target_ids + batch * stride_jb + head * stride_jh + entry * stride_jt, mask=listed, other=-1)
    row, place = row.to(tl.int64), place.to(tl.int64)
    ok = ((row >= 0) & (place >= 0))[:, None] & (dim < HEAD_DIM)[None, :]
    source += batch * stride_sb + head * stride_sh
    target += batch * stride_tb + head * stride_th
    states = tl.load(source + row[:, None] * stride_sn + dim[None, :], mask=ok, other=0.0)
    tl.store(target + place[:, None] * stride_tn + dim[None, :], states, mask=ok)


def triton_copy_rows(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    """`attn_hub.copy_rows` by the kernel, which does not check ids."""
    batch, kv_heads, num_rows = source_ids.shape
    if num_rows == 0:
        return
    with torch.cuda.device_of(target):
        copy_rows_kernel[(batch * kv_heads, triton.cdiv(num_rows, _BLOCK_ROWS))](
            source, target, source_ids, target_ids, num_rows, kv_heads,
            *source.stride()[:3],
            *target.stride()[:3],
            *source_ids.stride(),
            *target_ids.stride(),
            HEAD_DIM=source.shape[3], BLOCK_N=_BLOCK_ROWS, BLOCK_D=triton.next_power_of_2(source.shape[3]),
        )  # fmt: skip
