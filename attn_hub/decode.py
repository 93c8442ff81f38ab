"""Decode attention over weighted parts: Triton kernels for CUDA queries, plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from attn_hub.parts import WeightedPart
from attn_hub.reference import ReferenceSplits, reference_weighted_decode_attention

if TYPE_CHECKING:
    from attn_hub.kernels.weighted_decode import TritonSplits


def weighted_decode_attention(query: Tensor, parts: Sequence[WeightedPart], scale: float | None = None) -> Tensor:
    """sum_p sum_j exp(w_pj + s q.k_pj) v_pj / sum_p sum_j exp(w_pj + s q.k_pj) over the rows j of all parts p.

    query: [B, 1, H, D] float32, bfloat16 or float16; query head h belongs to kv head h // (H // Hkv).
    parts: at least one `WeightedPart`; a row that two parts name is counted twice. Statistics are float32.
    scale: softmax scale s, 1 / sqrt(D) if None.
    Returns [B, 1, H, D] in the query's dtype, zeros where no part names a row.
    Raises ValueError or TypeError, naming the part, where a field does not fit; on a CPU also IndexError for an id
    outside [-1, N) and ValueError for a length outside [0, N], which the GPU does not check.
    Source: RetrievalAttention (arXiv 2409.10516) appendix B.1; weighted rows as in RetroInfer (arXiv 2505.02922).
    """
    if query.is_cuda:
        from attn_hub.kernels.weighted_decode import triton_weighted_decode_attention  # Triton only where it is used

        return triton_weighted_decode_attention(query, parts, scale)
    return reference_weighted_decode_attention(query, parts, scale)


def decode_splits(
    query: Tensor, parts: Sequence[WeightedPart], scale: float | None = None
) -> ReferenceSplits | TritonSplits:
    """`weighted_decode_attention` in steps: `attend(i)` reads the rows and ids of the parts before i, as they are then,
    `merge()` those of the others, and gives the result. So what is known early is attended to while the ids of another
    part are still looked for. Arguments and errors as there."""
    if query.is_cuda:
        from attn_hub.kernels.weighted_decode import TritonSplits

        return TritonSplits(query, parts, scale)
    return ReferenceSplits(query, parts, scale)
