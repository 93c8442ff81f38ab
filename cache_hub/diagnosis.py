"""How well a retrieved set agrees with an exact scan, for stats.agreement."""

from __future__ import annotations

import torch
from torch import Tensor

from .index.knn import exact_topk


def agreement_with_exact(
    queries: Tensor, keys: Tensor, static_keys: Tensor, found: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Recall, mass and exact mass [R, g] of one step, as stats.Agreement defines them.

    queries [R, g, D]; keys [R, N, D] that could be retrieved; static_keys [R, S, D]; found [R, g, T], or [R, 1, T]
    where a group shares its list: rows of keys, -1 pads, of which every query head of the group attends to the union.
    All on the CPU, any float dtype.
    """
    exact = exact_topk(keys, queries.float(), min(top_k, keys.shape[1]))[1]
    recall = (exact[..., :, None] == found[..., None, :]).any(-1).float().mean(-1)
    logits = queries.float() @ torch.cat((keys, static_keys), 1).float().transpose(1, 2) / keys.shape[2] ** 0.5
    weights = logits.softmax(-1)
    mass, exact_mass = (_mass(weights, unite(ids), keys.shape[1]) for ids in (found, exact))
    return recall, mass, exact_mass


def unite(ids: Tensor) -> Tensor:
    """Union over the group of ids [R, g, k] -> [R, g * k] ascending, repeated ids replaced by -1."""
    flat = ids.flatten(1).sort(dim=1).values
    flat[:, 1:].masked_fill_(flat[:, 1:] == flat[:, :-1], -1)
    return flat


def _mass(weights: Tensor, united: Tensor, indexed: int) -> Tensor:
    """Softmax mass [R, g] of the rows `united` [R, T] (-1 pads) and of all from `indexed` on; weights [R, g, n]."""
    retrieved = weights.gather(2, united.clamp(min=0).long()[:, None].expand(-1, weights.shape[1], -1))
    return weights[..., indexed:].sum(-1) + (retrieved * (united >= 0)[:, None]).sum(-1)
