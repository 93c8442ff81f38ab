"""Query links by co-occurrence, with torch's operations on a GPU; csrc/co_occurrence.cpp does the same on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_LATEST_LISTS = 3
# Keys whose candidates are ranked at once.
_KEYS_AT_ONCE = 1 << 17


def co_occurrence_links(lists: Tensor, n: int, width: int) -> Tensor:
    """The keys that stand nearest to each of n keys in the latest lists that name it: [n, width] int32, -1 pads at the
    end.

    lists [g, M, k] int32, as causal_knn returns them for one row; of one position, those of a later head come later.
    Each of the three latest lists that name a key adds to the weight of its member of rank j, where the key has rank r,
    131072 // (2 + |j - r|) + k - j. Greatest weight first, equal ones by id.
    """
    device, k = lists.device, lists.shape[2]
    by_time = lists.transpose(0, 1).reshape(-1, k)
    places = _latest_places(by_time, n)
    links = torch.full((n, width), -1, dtype=torch.int32, device=device)
    rank = torch.arange(k, device=device)
    for first in range(0, n if width else 0, _KEYS_AT_ONCE):
        place = places[first : first + _KEYS_AT_ONCE]
        key = torch.arange(first, first + len(place), device=device)[:, None]
        ids = by_time[place.clamp(min=0) // k].long()
        weight = 131072 // (2 + (rank - place[..., None] % k).abs()) + k - rank
        wanted = (place >= 0)[..., None] & (ids >= 0) & (ids != key[..., None])
        ids, weight = (torch.where(wanted, x, 0).flatten(1) for x in (ids, weight))
        ids, order = torch.where(wanted.flatten(1), ids, n).sort(1)
        weight = weight.gather(1, order)
        # A candidate stands side by side with itself, once for each list; its first place gets the sum.
        total = weight.clone()
        for ahead in range(1, _LATEST_LISTS):
            again = ids[:, ahead:] == ids[:, :-ahead]
            total[:, :-ahead] += torch.where(again, weight[:, ahead:], 0)
        total[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], 0)
        best = (total * (n + 1) + (n - ids)).masked_fill_(total == 0, -1).topk(min(width, ids.shape[1])).values
        chosen = torch.where(best >= 0, n - best % (n + 1), -1)
        links[first : first + len(place), : chosen.shape[1]] = chosen.int()
    return links


def _latest_places(by_time: Tensor, n: int) -> Tensor:
    """Where in by_time [T, k], flattened, each of n keys is named last: [n, 3] int64, latest first, -1 pads."""
    backwards = by_time.flatten().flip(0)
    named, order = backwards.sort(stable=True)
    begin = torch.searchsorted(named, torch.arange(n + 1, dtype=named.dtype, device=named.device))
    at = begin[:-1, None] + torch.arange(_LATEST_LISTS, device=named.device)
    there = at < begin[1:, None]
    return torch.where(there, len(named) - 1 - order[at.clamp(max=max(len(named) - 1, 0))], -1)
