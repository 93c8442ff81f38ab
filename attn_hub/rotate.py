"""Rotary position embedding (Su et al. 2021) of queries and keys."""

import torch
from torch import Tensor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [b, L, heads, D] by cos and sin [b or 1, L, 1, D / 2] of the same dtype; pairs are (i, i + D / 2), as in
    Hugging Face. On a GPU one kernel with the same rounding, where no gradient is wanted."""
    if states.is_cuda and states.stride(3) == 1 and not torch.is_grad_enabled():
        from attn_hub.kernels.rotate import triton_rotate  # Triton only where it is used

        return triton_rotate(states, cos, sin)
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
