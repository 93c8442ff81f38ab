"""Copying rows between two KV stores, by id and without the host's help."""

import torch
from torch import Tensor


def copy_rows(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    """target[b, h, target_ids[b, h, t]] = source[b, h, source_ids[b, h, t]], except where an id is -1.

    source [B, Hkv, N, D], on the target's device or, for a CUDA target, in pinned host memory; target [B, Hkv, M, D],
    the same dtype; both with contiguous rows. ids [B, Hkv, T] int32 or int64 on the target's device. No row may be
    written twice. Raises ValueError where shapes or dtypes do not fit.
    """
    if source.dim() != 4 or target.dim() != 4 or source.stride(3) != 1 or target.stride(3) != 1:
        raise ValueError(
            f"got source {list(source.shape)}, target {list(target.shape)}, allowed: both [B, Hkv, N, D] with "
            "contiguous rows"
        )
    fits = source.shape[:2] == target.shape[:2] == source_ids.shape[:2] and source.shape[3] == target.shape[3]
    if not fits or source_ids.shape != target_ids.shape or source.dtype != target.dtype:
        raise ValueError(
            f"got source {source.dtype} {list(source.shape)}, target {target.dtype} {list(target.shape)}, ids "
            f"{list(source_ids.shape)}, {list(target_ids.shape)}; allowed: one dtype, [B, Hkv, N, D], [B, Hkv, M, D], "
            "twice [B, Hkv, T]"
        )
    if source.device != target.device and not (target.is_cuda and source.is_pinned()):
        raise ValueError(f"source: got {source.device}, allowed: {target.device} or, for CUDA, pinned host memory")
    if target.is_cuda:
        from attn_hub.kernels.copy_rows import triton_copy_rows  # Triton only where it is used

        triton_copy_rows(source, target, source_ids, target_ids)
        return
    given = (source_ids >= 0) & (target_ids >= 0)
    b, h, _ = torch.nonzero(given, as_tuple=True)
    target[b, h, target_ids[given].long()] = source[b, h, source_ids[given].long()]
