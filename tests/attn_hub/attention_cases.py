"""Inputs of the attention tests, and weighted attention written out row by row in float64."""

import os
from collections.abc import Sequence
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from attn_hub import WeightedPart

# The kernels: compiled where there is a GPU, else by Triton's interpreter.
KERNELS = (
    pytest.param("compiled", marks=pytest.mark.gpu)
    if torch.cuda.is_available()
    else pytest.param(
        "interpreted",
        marks=pytest.mark.skipif(
            os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_attention_interpreted.py in its own process"
        ),
    )
)


def random_store(batch: int, kv_heads: int, rows: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, kv_heads, rows, head_dim).to(dtype)


def random_ids(rows: int, *shape: int, pads: float = 0.25, dtype: torch.dtype = torch.int32) -> Tensor:
    """Ids in [0, rows), a share of them -1."""
    ids = torch.randint(0, rows, shape)
    return torch.where(torch.rand(shape) < pads, -1, ids).to(dtype)


def move(parts: Sequence[WeightedPart], device: str) -> list[WeightedPart]:
    def to(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return [WeightedPart(**{field.name: to(getattr(part, field.name)) for field in fields(part)}) for part in parts]


def written_out_attention(query: Tensor, parts: Sequence[WeightedPart], scale: float | None = None) -> Tensor:
    """The interface's formula head by head, float64 [B, 1, H, D]; zeros where no row is named."""
    batch, _, heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, 1, heads, head_dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            logits, values, signs = [], [], []
            for part in parts:
                kv_heads = part.keys.shape[1]
                kv = h // (heads // kv_heads)
                if part.ids is not None:
                    rows = part.ids[b, h if part.ids.shape[1] == heads else kv].long()
                else:
                    rows = torch.arange(part.keys.shape[2] if part.lengths is None else int(part.lengths[b, kv]))
                weights = torch.zeros(batch, heads, part.num_rows, dtype=torch.float64)
                if part.log_weights is not None:
                    given = part.log_weights.double()
                    if given.dim() == 3 and given.shape[1] == kv_heads:
                        given = given.repeat_interleave(heads // kv_heads, dim=1)
                    weights = weights + given
                kept = (rows >= 0).nonzero().squeeze(1)
                key_rows = part.keys[b, kv, rows[kept]].double()
                logits.append(scale * key_rows @ query[b, 0, h].double() + weights[b, h, kept])
                values.append(part.values[b, kv, rows[kept]].double())
                signs.append(torch.ones(len(kept), dtype=torch.float64))
                if part.stand_ins is not None:
                    others = part.stand_in_ids[b, h if part.ids.shape[1] == heads else kv, kept].long()
                    there = (others >= 0).nonzero().squeeze(1)
                    logits.append(scale * part.stand_ins[b, kv, others[there]].double() @ query[b, 0, h].double())
                    values.append(values[-1][there])
                    signs.append(-torch.ones(len(there), dtype=torch.float64))
            joined = torch.cat(logits)
            if joined.numel():
                shares = (joined - joined.max()).exp() * torch.cat(signs)
                out[b, 0, h] = shares @ torch.cat(values) / shares.sum()
    return out


def plain_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of query [B, 1, H, D] over all rows, float64 [B, 1, H, D]."""
    group = query.shape[2] // keys.shape[1]
    k = keys.double().repeat_interleave(group, dim=1)
    v = values.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("bhd,bhnd->bhn", query.squeeze(1).double(), k) * query.shape[3] ** -0.5
    return torch.einsum("bhn,bhnd->bhd", scores.softmax(-1), v).unsqueeze(1)
