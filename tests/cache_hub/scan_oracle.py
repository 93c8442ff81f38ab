"""What the kernels of cache_hub/index/scan_kernels.py compute, in plain torch."""

import torch
from torch import Tensor

from cache_hub.index.device_keys import DeviceKeys


def scores_of(query: Tensor, keys: DeviceKeys) -> Tensor:
    """[B, Hkv, g, N] float32, by whole numbers: the same to the last bit; -inf behind the keys."""
    batch, kv_heads, room, dim = keys.codes.shape
    asked = query.reshape(batch, kv_heads, -1, dim).float()
    asked = asked / (asked.abs().amax(3, keepdim=True).clamp(min=1e-30) / 127)
    upper = (asked + 0.5).floor()
    lower = ((asked - upper) * 256 + 0.5).floor().clamp(max=127)
    whole = torch.einsum("bhgd,bhnd->bhgn", (256 * upper + lower).double(), keys.codes.double())
    scores = whole.float() * keys.scales[:, :, None]
    there = torch.arange(room, device=scores.device) < keys.lengths[:, :, None, None]
    return scores.masked_fill(~there, float("-inf"))


def best_of(scores: Tensor, lengths: Tensor, k: int) -> Tensor:
    """ids [B, Hkv, g, k] int32 of the k best of scores [B, Hkv, g, N], ascending, the lowest of equal ones; -1 behind
    them where lengths [B, Hkv] are fewer."""
    order = scores.sort(dim=3, descending=True, stable=True).indices[..., :k]
    none = scores.shape[3]
    ids = torch.full((*scores.shape[:3], k), none, device=scores.device)
    ids[..., : order.shape[3]] = order
    ids[torch.arange(k, device=scores.device) >= lengths[:, :, None, None].expand(-1, -1, scores.shape[2], -1)] = none
    ids = ids.sort(dim=3).values
    return ids.masked_fill(ids == none, -1).int()


def union_of(ids: Tensor, first: int) -> Tensor:
    """Positions [B, Hkv, g * k] of ids [B, Hkv, g, k], each where the first head has it; -1 elsewhere."""
    flat = ids.flatten(2)
    earlier = torch.ones(flat.shape[2], flat.shape[2], device=flat.device).tril(-1).bool()
    repeated = ((flat[..., :, None] == flat[..., None, :]) & earlier).any(3)
    return torch.where(repeated | (flat < 0), -1, flat + first)
