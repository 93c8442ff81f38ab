"""Dense attention over the prompt: flash-attn where it is importable, else torch's scaled_dot_product_attention."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Rows of a causal mask held at a time where there are more keys than queries: 1,024 x 128K is 128 MiB.
_MASK_ROWS = 1024


def full_prefill_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Softmax attention, q [b, Lq, H, D], k and v [b, Lk, Hkv, D] -> [b, Lq, H, D], scale 1 / sqrt(D).

    Causal attention is aligned at the end: query i sees keys 0 .. i + Lk - Lq, as the last chunk of a prompt does.
    Keys are not repeated for the query heads that share them. Raises ValueError for shapes, dtypes or devices that do
    not fit, and for causal attention with more queries than keys.
    """
    _check(q, k, v, causal)
    flash = _flash_attn_func() if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) else None
    if flash is not None:
        return flash(q, k, v, causal=causal)
    group = q.shape[2] // k.shape[2]
    heads_first = (k.transpose(1, 2), v.transpose(1, 2))
    if group > 1 and q.is_cuda and q.dtype == torch.float32:
        # No fused CUDA kernel takes float32 with grouped heads; torch would hold all Lq x Lk scores.
        out = torch.empty_like(q)
        for j in range(group):
            out[:, :, j::group] = _attend(q[:, :, j::group].transpose(1, 2), *heads_first, causal).transpose(1, 2)
        return out
    return _attend(q.transpose(1, 2), *heads_first, causal).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q [b, H, Lq, D], k and v [b, Hkv, Lk, D] -> [b, H, Lq, D]."""
    rows, columns = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if not causal or rows == columns:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    if q.is_cuda:
        from torch.nn.attention.bias import causal_lower_right  # imports Triton

        return scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(rows, columns), enable_gqa=grouped)
    blocks = []
    for start in range(0, rows, _MASK_ROWS):
        stop = min(start + _MASK_ROWS, rows)
        last = columns - rows + stop
        visible = torch.ones(stop - start, last, dtype=torch.bool, device=q.device).tril_(last - (stop - start))
        blocks.append(
            scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, :last], v[:, :, :last], attn_mask=visible, enable_gqa=grouped
            )
        )
    return torch.cat(blocks, dim=2)


@cache
def _flash_attn_func() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must be [b, Lq, H, D] and [b, Lk, Hkv, D]")
    if v.shape != k.shape:
        raise ValueError(f"v is {list(v.shape)}, must have the shape of k {list(k.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    if len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k, v are {[(str(x.dtype), str(x.device)) for x in (q, k, v)]}, must agree")
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries over {k.shape[1]} keys: causal attention needs Lq <= Lk")
