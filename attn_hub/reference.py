"""Float32 weighted decode attention in plain torch: the oracle of the kernels, and the path taken on a CPU.

Source: RetrievalAttention (arXiv 2409.10516) appendix B.1, with an additive log weight per row. Query heads of a group
share a row of the store, so every product is [g, D] x [D, T] per kv head and no key is repeated g times.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attn_hub.parts import WeightedPart, check_parts


class ReferenceSplits:
    """`attn_hub.kernels.weighted_decode.TritonSplits` in plain torch: attends to some parts now, to others later."""

    def __init__(self, query: Tensor, parts: Sequence[WeightedPart], scale: float | None = None) -> None:
        check_parts(query, parts)
        self.parts, self._query = parts, query
        self._scaled = _scaled_query(query, scale)
        self._attended = 0
        self._selected: list[tuple[Tensor, Tensor, bool]] = []

    def attend(self, stop: int) -> None:
        """Reads the rows of the parts before `stop` that were not attended to yet, as they are now."""
        for part in self.parts[self._attended : stop]:
            self._selected += _selected(self._scaled, part)
        self._attended = max(self._attended, stop)

    def merge(self) -> Tensor:
        """[B, 1, H, D] over all parts."""
        self.attend(len(self.parts))
        shares = _shares([logits for logits, _, _ in self._selected], [away for _, _, away in self._selected])
        out = _weighted_sum(shares[0], self._selected[0][1])
        for share, (_, values, _) in zip(shares[1:], self._selected[1:], strict=True):
            out += _weighted_sum(share, values)
        return out.unsqueeze(1).to(self._query.dtype)


def reference_weighted_decode_attention(
    query: Tensor, parts: Sequence[WeightedPart], scale: float | None = None
) -> Tensor:
    """One softmax over the rows of all parts; arguments and result as `attn_hub.weighted_decode_attention`."""
    return ReferenceSplits(query, parts, scale).merge()


def partial_attention(query: Tensor, part: WeightedPart, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention over one part alone: out [B, H, D] and its natural log-sum-exp [B, H], float32; 0 and -inf if empty.
    Rows that stand-ins are taken from count in full."""
    check_parts(query, [part])
    logits, values, _ = _selected(_scaled_query(query, scale), part)[0]
    return _weighted_sum(_softmax(logits), values), logits.logsumexp(dim=-1)


def merge_partials(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets, outs [B, H, D] and lses [B, H], into that over their union, float32."""
    stacked = torch.stack([lse.float() for lse in lses])
    weights = _softmax(stacked.movedim(0, -1)).movedim(-1, 0)
    out = (weights.unsqueeze(-1) * torch.stack([out.float() for out in outs])).sum(dim=0)
    return out, stacked.logsumexp(dim=0)


def _scaled_query(query: Tensor, scale: float | None) -> Tensor:
    """[B, 1, H, D] -> float32 [B, H, D] times the softmax scale."""
    return query.squeeze(1).float() * (query.shape[-1] ** -0.5 if scale is None else scale)


def _selected(scaled_query: Tensor, part: WeightedPart) -> list[tuple[Tensor, Tensor, bool]]:
    """Logits [B, H, T'], values [B, lists, T', D], float32, and whether they are taken away: the rows of the part, then
    their stand-ins with the same values. Masked rows have logit -inf and value 0.

    lists is Hkv, or H where each query head has its own ids. T' <= T: rows that no list needs are left out.
    """
    keys, values, masked = _first_rows(part) if part.ids is None else _gathered_rows(part.keys, part.values, part.ids)
    logits = _logits(scaled_query, keys)
    weights = part.grouped_log_weights(logits.shape[1])
    if weights is not None:
        logits.view(*weights.shape[:3], -1).add_(weights[..., : logits.shape[2]])
    if masked is not None:
        logits.masked_fill_(_by_head(masked, logits), -math.inf)
    found = [(logits, values.float(), False)]
    if part.stand_ins is not None and part.stand_in_ids is not None and logits.shape[2]:
        ids = part.stand_in_ids[..., : logits.shape[2]]
        ids = ids if masked is None else ids.masked_fill(masked, -1)
        rows, _, nobody = _gathered_rows(part.stand_ins, part.stand_ins, ids)
        theirs = _logits(scaled_query, rows)
        if nobody is not None:
            theirs.masked_fill_(_by_head(nobody, theirs), -math.inf)
        if theirs.shape[2]:
            found.append((theirs, found[0][1][:, :, : theirs.shape[2]], True))
    return found


def _logits(scaled_query: Tensor, keys: Tensor) -> Tensor:
    """[B, H, T] of scaled_query [B, H, D] and keys [B, lists, T, D]."""
    batch, heads, head_dim = scaled_query.shape
    lists, rows = keys.shape[1:3]
    grouped = scaled_query.reshape(batch, lists, heads // lists, head_dim)
    return (grouped @ keys.float().transpose(2, 3)).view(batch, heads, rows)


def _by_head(masked: Tensor, logits: Tensor) -> Tensor:
    """masked [B, lists, T] for each query head, [B, H, T]."""
    return masked.repeat_interleave(logits.shape[1] // masked.shape[1], 1)


def _first_rows(part: WeightedPart) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [B, Hkv, L, D] up to the longest length, and the mask [B, Hkv, L] where lengths differ."""
    if part.lengths is None:
        return part.keys, part.values, None
    shortest, longest = (int(n) for n in part.lengths.aminmax())
    if shortest < 0 or longest > part.keys.shape[2]:
        raise ValueError(f"lengths range over [{shortest}, {longest}], must lie in [0, {part.keys.shape[2]}]")
    keys, values = part.keys[:, :, :longest], part.values[:, :, :longest]
    if shortest == longest:
        return keys, values, None
    masked = torch.arange(longest, device=part.lengths.device) >= part.lengths.unsqueeze(2)
    # Unwritten rows may hold NaN, and 0 * NaN is NaN.
    return keys, values.masked_fill(masked.unsqueeze(3), 0.0), masked


def _gathered_rows(keys: Tensor, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [B, lists, T, D] of ids [B, lists, T], and the mask of -1 entries if there are any."""
    lowest, highest = (int(n) for n in ids.aminmax()) if ids.numel() else (-1, -1)
    if lowest < -1 or highest >= keys.shape[2]:
        raise IndexError(f"ids range over [{lowest}, {highest}], must lie in [-1, {keys.shape[2] - 1}]")
    if highest < 0:
        empty = keys.new_empty(*ids.shape[:2], 0, keys.shape[3])
        return empty, empty, None
    masked = None
    if lowest < 0:
        masked = ids < 0
        used = int((~masked).flatten(0, 1).any(0).nonzero()[-1]) + 1
        ids, masked = ids[..., :used].clamp(min=0), masked[..., :used]
    at = _flat_rows(ids, keys)
    same_layout = values.stride() == keys.stride()
    keys, values = _take_rows(keys, at), _take_rows(values, at if same_layout else _flat_rows(ids, values))
    if masked is not None:
        values.masked_fill_(masked.unsqueeze(3), 0.0)
    return keys, values, masked


def _flat_rows(ids: Tensor, store: Tensor) -> Tensor:
    """Rows of the flattened store, [B, lists, T] int64, that hold rows ids [B, lists, T] of store [B, Hkv, N, D]."""
    batch, kv_heads = store.shape[:2]
    per_batch, per_head, per_row = (stride // _row_step(store) for stride in store.stride()[:3])
    first = _first_flat_rows(batch, kv_heads, ids.shape[1], per_batch, per_head, ids.device)
    return torch.add(first, ids, alpha=per_row)


@lru_cache(maxsize=64)
def _first_flat_rows(
    batch: int, kv_heads: int, lists: int, per_batch: int, per_head: int, device: torch.device
) -> Tensor:
    """[B, lists, 1]: where each list's kv head begins."""
    heads = torch.arange(lists, device=device).view(-1, 1) // (lists // kv_heads)
    return torch.arange(batch, device=device).view(-1, 1, 1) * per_batch + heads * per_head


def _take_rows(store: Tensor, at: Tensor) -> Tensor:
    """Copy flat rows at [B, lists, T] of store [B, Hkv, N, D] -> [B, lists, T, D].

    All strides are multiples of their greatest common divisor, so any store is a list of rows that far apart (they may
    overlap), and one index_select copies whole rows: 3 to 4 times faster than gather or indexing with three tensors.
    """
    step = _row_step(store)
    count = sum((n - 1) * stride for n, stride in zip(store.shape[:3], store.stride()[:3], strict=True)) // step + 1
    flat = store.as_strided((count, store.shape[3]), (step, 1))
    return flat.index_select(0, at.view(-1)).view(*at.shape, store.shape[3])


def _row_step(store: Tensor) -> int:
    return math.gcd(*store.stride()[:3]) or 1


def _shares(logits: Sequence[Tensor], away: Sequence[bool]) -> list[Tensor]:
    """One softmax over the last dimensions of all logits [B, H, T], of which some are taken away from the others."""
    if not any(away):
        return list(_softmax(torch.cat(list(logits), -1)).split([part.shape[2] for part in logits], -1))
    most = torch.cat([part.amax(-1, keepdim=True) for part in logits if part.shape[2]], -1).amax(-1, keepdim=True)
    most.masked_fill_(most == -math.inf, 0.0)
    shares = [torch.exp(part - most) * (-1 if taken else 1) for part, taken in zip(logits, away, strict=True)]
    total = sum((share.sum(-1, keepdim=True) for share in shares), torch.zeros_like(most))
    return [share / total.masked_fill(total == 0, 1.0) for share in shares]


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; zeros where every logit is -inf or there is none."""
    if logits.shape[-1] == 0:
        return logits
    return logits.softmax(dim=-1).masked_fill_(logits.amax(dim=-1, keepdim=True) == -math.inf, 0.0)


def _weighted_sum(probabilities: Tensor, values: Tensor) -> Tensor:
    """[B, H, T] x [B, lists, T, D] -> [B, H, D]."""
    batch, heads, rows = probabilities.shape
    lists = values.shape[1]
    return (probabilities.view(batch, lists, heads // lists, rows) @ values).view(batch, heads, -1)
