"""Rows of the causal attention over a prompt, and what all of them give each of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import ROW_BYTES, choose_backend

_WEIGHTS = 1 << 25


def causal_rows(query: Tensor, key: Tensor, start: int, stop: int) -> Tensor:
    """The softmax attention of tokens start to stop - 1, [B, Hkv, g, stop - start, stop] float32 (float64 for that),
    scale 1 / sqrt(D). Logits are made in float32 at least: in 16 bits those of 20 are .06 off.

    query [B, n, H, D], key [B, n, Hkv, D], rotated, of one type; the query heads of a group share the keys, which are
    not repeated.
    """
    batch, _, kv_heads, dim = key.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    asked = query[:, start:stop].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, g, rows, D]
    group, rows = asked.shape[2:4]
    seen = key[:, :stop].permute(0, 2, 3, 1)  # [B, Hkv, D, stop]
    logits = asked.reshape(batch, kv_heads, group * rows, dim).to(dtype).mul(dim**-0.5) @ seen.to(dtype)
    logits = logits.view(batch, kv_heads, group, rows, stop)
    future = torch.ones(rows, stop, dtype=torch.bool, device=key.device).triu_(start + 1)
    return logits.masked_fill_(future, float("-inf")).softmax(-1)


def rows_bytes(heads: int, kv_heads: int, head_dim: int, rows: int, tokens: int) -> int:
    """What `causal_rows` of a prompt's last rows takes at least: logits with float32 keys, then with the softmax."""
    logits = 4 * tokens * heads * rows
    return logits + max(logits, 4 * tokens * kv_heads * head_dim)


def received_mass(query: Tensor, key: Tensor, block: int = 0, backend: str = "auto") -> Tensor:
    """The sum of all rows of the causal attention, [B, Hkv, g, n] float32; with torch `block` rows are held at a time,
    0: as many as have 2^25 weights. backend: "torch", "triton" on CUDA but for float64, "auto": the latter where it can
    be. Raises ValueError for another."""
    batch, tokens, kv_heads, dim = key.shape
    if choose_backend(backend, query, ROW_BYTES) == "triton":
        from .blocked_kernels import triton_log_sums, triton_received

        states, scale = (query.transpose(1, 2), key.transpose(1, 2)), dim**-0.5
        mass = triton_received(*states, triton_log_sums(*states, scale)[0], scale)
        return mass.squeeze(2).unflatten(1, (kv_heads, -1))
    block = block or max(_WEIGHTS // (batch * query.shape[2] * tokens), 1)
    mass = torch.zeros(batch, kv_heads, query.shape[2] // kv_heads, tokens, device=key.device)
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        mass[..., :stop] += causal_rows(query, key, start, stop).sum(3)
    return mass
