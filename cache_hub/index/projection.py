"""From query -> key lists to links among the keys, on a GPU; csrc/graph_build.cpp does the same on a CPU.

Source of prune and fill: RoarGraph (arXiv 2408.08933), projection step, with the union of all lists that share a pivot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .co_occurrence import co_occurrence_links

_BLOCK_PAIRS = 32


def project(
    keys: Tensor, by_query: Tensor, by_key: Tensor, degree: int, query_links: int, co_occurrence: bool
) -> Tensor:
    """Links of every key: at most `query_links` from the query lists, by co-occurrence or by RoarGraph's projection,
    then the nearest keys up to `degree`.

    keys [R, N, D], by_query [R, g, M, k] and by_key [R, N, k'] int32 as causal_knn and key_knn return them, all on one
    device. Returns [R, N, degree] int32, -1 pads at the end.
    """

    def of_queries(head: Tensor, lists: Tensor) -> Tensor:
        if co_occurrence:
            return co_occurrence_links(lists, len(head), query_links)
        return _project_head(head.contiguous(), lists.flatten(0, 1), query_links)

    return torch.stack(
        [
            _with_nearest(of_queries(head, lists), near, degree)
            for head, lists, near in zip(keys, by_query, by_key, strict=True)
        ]
    )


def _project_head(keys: Tensor, lists: Tensor, width: int) -> Tensor:
    """Query links [N, width] of one kv head; keys [N, D], lists [g * M, k]."""
    n = len(keys)
    if width == 0:
        return lists.new_empty(n, 0)
    listed = lists.long()
    # A pair is one number, key * N + candidate.
    pairs = (listed[:, :1] * n + listed[:, 1:])[listed[:, 1:] >= 0]
    forward = _prune_fill(keys, pairs.unique(), width).long()
    key = torch.arange(n, device=keys.device)[:, None].expand_as(forward)
    linked = forward >= 0
    pairs = torch.cat((key[linked] * n + forward[linked], forward[linked] * n + key[linked]))
    return _prune_fill(keys, pairs.unique(), width)


def _prune_fill(keys: Tensor, pairs: Tensor, width: int) -> Tensor:
    """RoarGraph's occlusion rule under the inner product, filling up, for the candidates that ascending `pairs` name:
    [N, width] int32, -1 pads."""
    n, dim = keys.shape
    node, candidate = pairs // n, pairs % n
    others = node != candidate
    node, candidate = node[others], candidate[others]
    scores = _pair_scores(keys, node, candidate)
    by_node = ((node << 32) - _ordinal(scores)).argsort(stable=True)
    begin = torch.searchsorted(node, torch.arange(n + 1, device=keys.device))
    links = torch.full((n, width), -1, dtype=torch.int32, device=keys.device)
    blocks = {"BLOCK_W": triton.next_power_of_2(width), "BLOCK_D": triton.next_power_of_2(dim)}
    warps = 1 if blocks["BLOCK_W"] * blocks["BLOCK_D"] <= 2048 else 4
    with torch.cuda.device_of(keys):
        prune_fill_kernel[(n,)](
            keys, candidate[by_node], scores[by_node], begin, links, dim, width, num_warps=warps, **blocks
        )
    return links


def _pair_scores(keys: Tensor, node: Tensor, candidate: Tensor) -> Tensor:
    """Inner products [P] float32 of the keys [N, D] that node and candidate [P] name."""
    scores = torch.empty(len(node), device=keys.device)
    if len(node):
        with torch.cuda.device_of(keys):
            pair_scores_kernel[(triton.cdiv(len(node), _BLOCK_PAIRS),)](
                keys, node, candidate, scores, len(node), keys.shape[1],
                BLOCK_P=_BLOCK_PAIRS, BLOCK_D=triton.next_power_of_2(keys.shape[1]), num_warps=2,
            )  # fmt: skip
    return scores


@triton.jit(do_not_specialize=["pairs"])
def pair_scores_kernel(  # type: ignore[no-untyped-def]
    keys, node, candidate, scores, pairs, dim, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program: the inner products of BLOCK_P pairs of keys."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    dims = tl.arange(0, BLOCK_D)
    ok = (pair < pairs)[:, None] & (dims < dim)[None, :]
    a = tl.load(node + pair, mask=pair < pairs, other=0)
    b = tl.load(candidate + pair, mask=pair < pairs, other=0)
    left = tl.load(keys + a[:, None] * dim + dims[None, :], mask=ok, other=0.0).to(tl.float32)
    right = tl.load(keys + b[:, None] * dim + dims[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(scores + pair, tl.sum(left * right, 1), mask=pair < pairs)


def _ordinal(scores: Tensor) -> Tensor:
    """Whole numbers of 32 bits in the order of float32 scores, int64."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long()


@triton.jit
def prune_fill_kernel(  # type: ignore[no-untyped-def]
    keys, candidates, scores, begin, links, dim, width, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program: one key. Keeps its candidate p (best first) unless a kept r has <p, r> > its score, until `width`
    are kept; then the best rejected ones fill up."""
    node = tl.program_id(0).to(tl.int64)
    at = tl.load(begin + node)
    stop = tl.load(begin + node + 1)
    slot = tl.arange(0, BLOCK_W)
    dims = tl.arange(0, BLOCK_D)
    kept_rows = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
    kept_ids = tl.full([BLOCK_W], -1, tl.int32)
    rejected_ids = tl.full([BLOCK_W], -1, tl.int32)
    kept = 0
    rejected = 0
    while (at < stop) & (kept < width):
        candidate = tl.load(candidates + at)
        row = tl.load(keys + candidate * dim + dims, mask=dims < dim, other=0.0).to(tl.float32)
        to_kept = tl.where(slot < kept, tl.sum(kept_rows * row[None, :], 1), float("-inf"))
        occluded = (tl.max(to_kept, 0) > tl.load(scores + at)).to(tl.int32)
        # Slot -1 is nobody's.
        keep_at = tl.where(occluded == 0, kept, -1)
        reject_at = tl.where(occluded == 0, -1, rejected)
        kept_rows = tl.where((slot == keep_at)[:, None], row[None, :], kept_rows)
        kept_ids = tl.where(slot == keep_at, candidate.to(tl.int32), kept_ids)
        rejected_ids = tl.where(slot == reject_at, candidate.to(tl.int32), rejected_ids)
        kept += 1 - occluded
        rejected += occluded
        at += 1
    out = links + node * width
    tl.store(out + slot, kept_ids, mask=slot < kept)
    tl.store(out + kept + slot, rejected_ids, mask=(slot < rejected) & (kept + slot < width))


def _with_nearest(links: Tensor, near: Tensor, degree: int) -> Tensor:
    """links [N, w], then those of near [N, k'] that are not among them: [N, degree], -1 pads."""
    fresh = (near[:, :, None] != links[:, None, :]).all(2)
    both = torch.cat((links, near), 1)
    wanted = torch.cat((links >= 0, fresh), 1)
    place = wanted.cumsum(1) - 1
    place = torch.where(wanted & (place < degree), place, degree)
    out = torch.full((len(links), degree + 1), -1, dtype=torch.int32, device=links.device)
    return out.scatter_(1, place, both)[:, :degree]
