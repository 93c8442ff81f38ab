"""Triton kernels of weighted decode attention: split-K flash-decoding over rows gathered by id, then one merge.

Source: the split and merge of flash-decoding with the partial softmaxes of RetrievalAttention (arXiv 2409.10516)
appendix B.1; additive log weights as in RetroInfer (arXiv 2505.02922). Rows and ids are read where they lie, in GPU
memory or in pinned host memory, once for all query heads that attend to them.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_hub.parts import WeightedPart, check_parts

# Programs started per multiprocessor, so that enough row reads are in flight to fill the memory's bandwidth.
_PROGRAMS_PER_SM, _HOST_PROGRAMS_PER_SM = 2, 16
_MERGE_BLOCK = 32
# What changes from step to step must not compile a kernel anew.
_VARYING = [
    "num_rows", "num_splits", "first_split",
    "stride_ib", "stride_il", "stride_wb", "stride_wh", "stride_wg", "stride_rb", "stride_rh", "stride_jb", "stride_jl",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def attend_rows_kernel(  # type: ignore[no-untyped-def]
    query, keys, values, ids, log_weights, lengths, stand_ins, stand_in_ids, partial_out, partial_sum, partial_max,
    scale, num_rows, num_splits, first_split, num_kv_heads,
    stride_qb, stride_qh,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ib, stride_il, stride_it,
    stride_wb, stride_wh, stride_wg, stride_wt,
    stride_lb, stride_lh,
    stride_rb, stride_rh, stride_rn,
    stride_jb, stride_jl, stride_jt,
    HEAD_DIM: tl.constexpr, HEADS_PER_LIST: tl.constexpr, LISTS_PER_KV_HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: one split of one id list. Writes the sums of weighted values [HEADS_PER_LIST, D] and of weights,
    both over exp(max), and this max, of partial split `first_split + i`.

    A list serves the HEADS_PER_LIST query heads of its kv head, or one of them.
    """
    split = tl.program_id(1)
    lists = num_kv_heads * LISTS_PER_KV_HEAD
    batch = (tl.program_id(0) // lists).to(tl.int64)
    row_list = tl.program_id(0) % lists
    kv_head = (row_list // LISTS_PER_KV_HEAD).to(tl.int64)

    member = tl.arange(0, BLOCK_H)
    head = row_list * HEADS_PER_LIST + member
    head_ok = member < HEADS_PER_LIST
    dim = tl.arange(0, BLOCK_D)
    dim_ok = dim < HEAD_DIM
    head_dim_ok = head_ok[:, None] & dim_ok[None, :]
    q = tl.load(query + batch * stride_qb + head[:, None] * stride_qh + dim[None, :], mask=head_dim_ok, other=0.0)
    q = q.to(COMPUTE)

    length = num_rows
    if lengths is not None:
        length = tl.minimum(num_rows, tl.load(lengths + batch * stride_lb + kv_head * stride_lh).to(tl.int32))
    rows_per_split = tl.cdiv(tl.cdiv(length, num_splits), BLOCK_N) * BLOCK_N
    start = split * rows_per_split
    stop = tl.minimum(start + rows_per_split, length)

    keys += batch * stride_kb + kv_head * stride_kh
    values += batch * stride_vb + kv_head * stride_vh
    if log_weights is not None:
        group: tl.constexpr = HEADS_PER_LIST * LISTS_PER_KV_HEAD
        log_weights += batch * stride_wb + kv_head * stride_wh + (head % group)[:, None] * stride_wg
    if stand_ins is not None:
        stand_ins += batch * stride_rb + kv_head * stride_rh
        stand_in_ids += batch * stride_jb + row_list * stride_jl

    running_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_N):
        entry = first + tl.arange(0, BLOCK_N)
        ok = entry < stop
        row = entry.to(tl.int64)
        if ids is not None:
            row = tl.load(ids + batch * stride_ib + row_list * stride_il + row * stride_it, mask=ok, other=-1)
            row = row.to(tl.int64)
            ok = row >= 0
        row_ok = ok[:, None] & dim_ok[None, :]
        k = tl.load(keys + row[:, None] * stride_kn + dim[None, :], mask=row_ok, other=0.0).to(COMPUTE)
        v = tl.load(values + row[:, None] * stride_vn + dim[None, :], mask=row_ok, other=0.0).to(COMPUTE)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if log_weights is not None:
            weight_ok = head_ok[:, None] & ok[None, :]
            weight = tl.load(log_weights + entry[None, :].to(tl.int64) * stride_wt, mask=weight_ok, other=0.0)
            logits += weight.to(tl.float32)
        logits = tl.where(ok[None, :], logits, float("-inf"))
        highest = tl.max(logits, axis=1)
        if stand_ins is not None:
            other = tl.load(stand_in_ids + entry.to(tl.int64) * stride_jt, mask=ok, other=-1).to(tl.int64)
            other_ok = ok & (other >= 0)
            c = tl.load(
                stand_ins + other[:, None] * stride_rn + dim[None, :],
                mask=other_ok[:, None] & dim_ok[None, :],
                other=0.0,
            )
            away = tl.dot(q, tl.trans(c.to(COMPUTE)), input_precision="ieee") * scale
            away = tl.where(other_ok[None, :], away, float("-inf"))
            highest = tl.maximum(highest, tl.max(away, axis=1))

        new_max = tl.maximum(running_max, highest)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp(logits - safe_max[:, None])
        if stand_ins is not None:
            p -= tl.exp(away - safe_max[:, None])
        keep = tl.exp(running_max - safe_max)
        total = total * keep + tl.sum(p, axis=1)
        acc = acc * keep[:, None] + tl.dot(p.to(COMPUTE), v, input_precision="ieee")
        running_max = new_max

    # An empty split has max -inf, and sums of 0.
    heads = lists * HEADS_PER_LIST
    slot = ((first_split + split).to(tl.int64) * (tl.num_programs(0) // lists) + batch) * heads + head
    tl.store(partial_max + slot, running_max, mask=head_ok)
    tl.store(partial_sum + slot, total, mask=head_ok)
    tl.store(partial_out + slot[:, None] * HEAD_DIM + dim[None, :], acc, mask=head_dim_ok)


@triton.jit(do_not_specialize=["total_splits"])
def merge_splits_kernel(  # type: ignore[no-untyped-def]
    partial_out, partial_sum, partial_max, out, total_splits,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one query head. Adds up all splits of all parts, divides, and casts to out's dtype."""
    query_head = tl.program_id(0).to(tl.int64)
    heads = tl.num_programs(0)
    dim = tl.arange(0, BLOCK_D)
    dim_ok = dim < HEAD_DIM

    running_max = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, total_splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        ok = split < total_splits
        slot = split.to(tl.int64) * heads + query_head
        highest = tl.load(partial_max + slot, mask=ok, other=float("-inf"))
        part_sum = tl.load(partial_sum + slot, mask=ok, other=0.0)
        part = tl.load(
            partial_out + slot[:, None] * HEAD_DIM + dim[None, :], mask=ok[:, None] & dim_ok[None, :], other=0.0
        )
        new_max = tl.maximum(running_max, tl.max(highest, axis=0))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp(highest - safe_max)
        keep = tl.exp(running_max - safe_max)
        total = total * keep + tl.sum(weight * part_sum, axis=0)
        acc = acc * keep + tl.sum(weight[:, None] * part, axis=0)
        running_max = new_max
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + query_head * HEAD_DIM + dim, acc.to(out.dtype.element_ty), mask=dim_ok)


class TritonSplits:
    """Weighted decode attention by the kernels, part by part: CUDA tensors and pinned stores, or Triton's interpreter.

    One launch per part when it is attended to, which reads its rows and ids as they are then, and one for the merge; no
    synchronisation with the host, so that all can be captured in CUDA graphs. Arguments as those of
    `attn_hub.weighted_decode_attention`.
    """

    def __init__(self, query: Tensor, parts: Sequence[WeightedPart], scale: float | None = None) -> None:
        check_parts(query, parts)
        batch, _, heads, head_dim = query.shape
        self.parts, self._attended = parts, 0
        self._query = query if query.stride(3) == 1 else query.contiguous()
        self._scale = head_dim**-0.5 if scale is None else scale
        splits = [_num_splits(query, part) for part in parts]
        self._first = list(itertools.accumulate(splits, initial=0))
        sizes = (self._first[-1], batch * heads)
        self._out = torch.empty(*sizes, head_dim, dtype=torch.float32, device=query.device)
        self._sum, self._max = (torch.empty(sizes, dtype=torch.float32, device=query.device) for _ in range(2))

    def attend(self, stop: int) -> None:
        """Reads the rows of the parts before `stop` that were not attended to yet."""
        with torch.cuda.device_of(self._query):
            for number in range(self._attended, stop):
                first, end = self._first[number : number + 2]
                if first < end:
                    self._launch(self.parts[number], first, end - first)
        self._attended = max(self._attended, stop)

    def merge(self) -> Tensor:
        """[B, 1, H, D] over all parts."""
        self.attend(len(self.parts))
        query = self._query
        head_dim = query.shape[3]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        with torch.cuda.device_of(query):
            merge_splits_kernel[(self._out.shape[1],)](
                self._out, self._sum, self._max, out, self._first[-1],
                HEAD_DIM=head_dim, BLOCK_S=_MERGE_BLOCK, BLOCK_D=_block_dim(head_dim),
            )  # fmt: skip
        return out

    def _launch(self, part: WeightedPart, first_split: int, num_splits: int) -> None:
        query = self._query
        batch, _, heads, head_dim = query.shape
        keys, values, ids, lengths = part.keys, part.values, part.ids, part.lengths
        weights = part.grouped_log_weights(heads)
        kv_heads, lists = keys.shape[1], _num_lists(part)
        heads_per_list = heads // lists
        attend_rows_kernel[(batch * lists, num_splits)](
            query, keys, values, ids, weights, lengths, part.stand_ins, part.stand_in_ids,
            self._out, self._sum, self._max,
            self._scale, part.num_rows, num_splits, first_split, kv_heads,
            query.stride(0), query.stride(2),
            *_strides(keys, 3),
            *_strides(values, 3),
            *_strides(ids, 3),
            *_strides(weights, 4),
            *_strides(lengths, 2),
            *_strides(part.stand_ins, 3),
            *_strides(part.stand_in_ids, 3),
            HEAD_DIM=head_dim, HEADS_PER_LIST=heads_per_list, LISTS_PER_KV_HEAD=lists // kv_heads,
            BLOCK_H=max(16, triton.next_power_of_2(heads_per_list)),
            BLOCK_D=_block_dim(head_dim), COMPUTE=_dot_dtype(query, keys), **_tile(part),
        )  # fmt: skip


def triton_weighted_decode_attention(
    query: Tensor, parts: Sequence[WeightedPart], scale: float | None = None
) -> Tensor:
    """`attn_hub.weighted_decode_attention` by the kernels."""
    return TritonSplits(query, parts, scale).merge()


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return tensor.stride()[:count] if tensor is not None else (0,) * count


def _block_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _dot_dtype(query: Tensor, keys: Tensor) -> tl.dtype:
    """The common dtype of query and keys, float32 if they differ; Triton's interpreter cannot multiply bfloat16."""
    if query.dtype != keys.dtype or query.device.type == "cpu":
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[query.dtype]


def _num_lists(part: WeightedPart) -> int:
    return part.keys.shape[1] if part.ids is None else part.ids.shape[1]


def _reads_host(part: WeightedPart) -> bool:
    return part.ids is not None and part.keys.device.type == "cpu" and part.keys.is_pinned()


def _tile(part: WeightedPart) -> dict[str, int]:
    """How a program reads. GPU memory: at most 16 KiB of keys at a time, so that three stages fit any GPU's shared
    memory; host memory: few rows by many small programs, as each waits long for its own. Both measured on an H100."""
    if _reads_host(part):
        return {"BLOCK_N": 16, "num_warps": 1, "num_stages": 1}
    row_bytes = part.keys.shape[3] * part.keys.element_size()
    return {"BLOCK_N": 64 if row_bytes <= 256 else 32, "num_warps": 4, "num_stages": 3}


def _num_splits(query: Tensor, part: WeightedPart) -> int:
    """Programs per id list: each has a block of rows at least, and together they fill the device."""
    lists = query.shape[0] * _num_lists(part)
    each = _HOST_PROGRAMS_PER_SM if _reads_host(part) else _PROGRAMS_PER_SM
    programs = each * _multiprocessors(query.device)
    return min(triton.cdiv(part.num_rows, _tile(part)["BLOCK_N"]), triton.cdiv(programs, lists))


def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 for Triton's interpreter, so that small tests have several splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
