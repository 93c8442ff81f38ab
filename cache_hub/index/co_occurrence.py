"""Query links by co-occurrence, with torch's operations and, on a GPU, kernels for two of the steps;
csrc/co_occurrence.cpp does the same on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LATEST_LISTS = 3
# Keys whose candidates are ranked at once.
_KEYS_AT_ONCE = 1 << 17
_ONE = 1 << 16


def co_occurrence_links(lists: Tensor, n: int, width: int) -> Tensor:
    """Links of each of n keys made of the lists that name it: [n, width] int32, -1 pads at the end.

    lists [g, M, k] int32, as causal_knn returns them for one row; of one position, those of a later head come later.
    Half of the links lead to the keys that stand nearest in the latest lists: each of the three latest lists that name
    a key adds to the weight of its member of rank j, where the key has rank r, 131072 // (2 + |j - r|) + k - j;
    greatest weight first, equal ones by id. The others lead to what a sample of the lists ranks first, see
    _sampled_pivots; places left are for more of the first kind.
    """
    by_time = lists.transpose(0, 1).reshape(-1, lists.shape[2])
    backwards = by_time.flatten().flip(0)
    named, order = backwards.sort(stable=True)
    begin = torch.searchsorted(named, torch.arange(n + 1, dtype=named.dtype, device=named.device))
    del backwards, named
    places = _latest_places(order, begin)
    nearest, search = nearest_in_lists, first_from
    if lists.is_cuda:
        from . import co_occurrence_kernels as kernels  # Triton only where it is used

        nearest, search = kernels.nearest_in_lists, kernels.first_from
    near = nearest(by_time, places, n, width)
    pivots = _sampled_pivots(by_time, order, begin, width // 2, search)
    half = (width + 1) // 2
    return _first_of_each(torch.cat((near[:, :half], pivots, near[:, half:]), 1), width)


def nearest_in_lists(by_time: Tensor, places: Tensor, n: int, width: int) -> Tensor:
    """What stands nearest to each of n keys, [n, width] int32, -1 pads, for lists by_time [T, k] that name none twice;
    places [n, 3] as _latest_places tells them."""
    device, k = by_time.device, by_time.shape[1]
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


def _latest_places(order: Tensor, begin: Tensor) -> Tensor:
    """Where in the lists, flattened, each of n keys is named last: [n, 3] int64, latest first, -1 pads. order [T * k]:
    places counted from the end, by key; begin [n + 1]: where the places of a key begin in it."""
    at = begin[:-1, None] + torch.arange(_LATEST_LISTS, device=order.device)
    there = at < begin[1:, None]
    return torch.where(there, len(order) - 1 - order[at.clamp(max=max(len(order) - 1, 0))], -1)


def _sampled_pivots(
    by_time: Tensor, order: Tensor, begin: Tensor, sampled: int, search: Callable[..., Tensor]
) -> Tensor:
    """What lists by_time [T, k] rank first, or second where that is the key itself: [n, sampled] int32, -1 for none.

    Sample i of a key is the latest list that names it not after number last - (last - first) * u * u, where
    u = (i + chance) / sampled and as large a part of the lists is before `first` as of the keys before the key.
    order and begin as in _latest_places; search: first_from, or its kernel.
    """
    (count, k), n, device = by_time.shape, len(begin) - 1, by_time.device
    if not sampled or not count:
        return torch.full((n, sampled), -1, dtype=torch.int32, device=device)
    key = torch.arange(n, device=device)[:, None]
    sample = torch.arange(sampled, device=device)
    u = (sample * _ONE + _chance(key, sample)) // sampled
    first = key * count // n
    due = count - 1 - ((count - 1 - first) * (u * u // _ONE)) // _ONE
    at = search(order, begin, count - 1 - due, k)
    there = at < begin[1:, None]
    ends = torch.nn.functional.pad(by_time[:, :2], (0, 1), value=-1)
    chosen = ends[count - 1 - order[at.clamp(max=len(order) - 1)] // k]
    pivots = torch.where(chosen[..., 0] == key, chosen[..., 1], chosen[..., 0])
    return torch.where(there, pivots, -1)


def first_from(order: Tensor, begin: Tensor, wanted: Tensor, k: int) -> Tensor:
    """Of each key's places in `order`, where the first one lies whose list, counted from the end, is not before
    `wanted` [n, s]: [n, s] int64, where the next key's begin if there is none. order and begin as in _latest_places."""
    counts = begin.diff()
    key = torch.arange(len(counts), device=order.device)
    own = order[begin[0] : begin[-1]] // k
    # A key's places ascend from the last list on; -1 stands before every key.
    most = len(order) // k + 1
    place = key.repeat_interleave(counts) * most + own
    return torch.searchsorted(place, key[:, None] * most + wanted) + begin[0]


def _chance(key: Tensor, sample: Tensor) -> Tensor:
    """As in csrc/co_occurrence.cpp: a number in [0, 65536) of two whole numbers, in 32 bits."""
    mixed = (key * 2654435761 + sample * 2246822519) & 0xFFFFFFFF
    mixed = ((mixed ^ mixed >> 15) * 2246822519) & 0xFFFFFFFF
    return (mixed ^ mixed >> 13) >> 16


def _first_of_each(ids: Tensor, width: int) -> Tensor:
    """The first `width` different ids >= 0 of each row of ids [n, W], in their order: [n, width], -1 pads."""
    again = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(2)
    wanted = (ids >= 0) & ~again
    place = wanted.cumsum(1) - 1
    place = torch.where(wanted & (place < width), place, width)
    out = torch.full((len(ids), width + 1), -1, dtype=ids.dtype, device=ids.device)
    return out.scatter_(1, place, ids)[:, :width]
