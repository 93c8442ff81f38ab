"""What the kernels of cache_hub/index/prune_kernels.py compute, in plain torch."""

import torch
from scan_oracle import best_of, scores_of
from torch import Tensor

from cache_hub.index.clustered_keys import ClusteredKeys


def ranks_of(query: Tensor, centroids: Tensor, sizes: Tensor) -> Tensor:
    """[B, Hkv, g, C]: inner products of query [B, 1, H, D] and centroids [B, Hkv, C, D]; -inf where sizes are 0."""
    batch, kv_heads, _, dim = centroids.shape
    products = query.reshape(batch, kv_heads, -1, dim).double() @ centroids.double().transpose(2, 3)
    return products.masked_fill((sizes == 0)[:, :, None], float("-inf"))


def scanned_by(chosen: Tensor, assignment: Tensor, counts: list[int]) -> Tensor:
    """[B, Hkv, N]: the tokens of clusters that any query head chose, chosen [B, Hkv, g, C], by assignment [B, Hkv, N]
    of each sequence's first `counts` tokens."""
    there = torch.arange(assignment.shape[2], device=assignment.device) < torch.tensor(
        counts, device=assignment.device
    ).view(-1, 1, 1)
    return chosen.any(2).gather(2, assignment.long()) & there


def best_scanned(query: Tensor, keys: ClusteredKeys, scanned: Tensor, k: int) -> Tensor:
    """ids [B, Hkv, g, k] of tokens, ascending, -1 behind: the k best of those scanned [B, Hkv, N]."""
    order = keys.tokens.long()
    there = torch.arange(order.shape[2], device=order.device) < keys.lengths[:, :, None]
    scores = scores_of(query, keys)  # in the order in which the keys lie
    by_token = torch.full_like(scores, float("-inf"))
    for b, head in torch.cartesian_prod(*map(torch.arange, order.shape[:2])).tolist():
        by_token[b, head][:, order[b, head][there[b, head]]] = scores[b, head][:, there[b, head]]
    by_token = by_token.masked_fill(~scanned[:, :, None], float("-inf"))
    return best_of(by_token, scanned.sum(2), k)
