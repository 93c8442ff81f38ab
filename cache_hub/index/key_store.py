"""Keys in CPU memory as the native code reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def as_key_store(keys: Tensor, extra: Tensor | None = None) -> _native.KeyStore:
    """A native view of keys, or values, [R, N, D] on the CPU, whose last dimension must be contiguous, and of extra
    [R, N] float32, contiguous; see TokenIndex.build. Copies nothing."""
    if keys.device.type != "cpu" or keys.dtype not in _DTYPE_CODES or keys.stride(2) != 1:
        raise ValueError(
            f"rows: got {keys.dtype} on {keys.device} with strides {keys.stride()}, allowed: float32, float16 or "
            "bfloat16 in CPU memory with contiguous rows"
        )
    heads, n, dim = keys.shape
    code = _DTYPE_CODES[keys.dtype]
    beside = 0 if extra is None else extra.data_ptr()
    return _native.KeyStore(keys.data_ptr(), code, heads, n, dim, keys.stride(0), keys.stride(1), beside)
