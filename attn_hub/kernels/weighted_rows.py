"""The kernels of `attn_hub.kernels.weighted_decode`: splits of one part, of two parts in one launch, and the merge."""

import triton
import triton.language as tl

# What changes from step to step must not compile a kernel anew. Triton specialises for each member of a tuple, whatever
# is asked for (3.6 to 3.9), so that two parts are two rows of arguments.
_VARYING = [
    "num_rows", "num_splits", "first_split",
    "stride_ib", "stride_il", "stride_wb", "stride_wh", "stride_wg", "stride_jb", "stride_jl",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def attend_rows_kernel(  # type: ignore[no-untyped-def]
    query, stride_qb, stride_qh, partial_out, partial_sum, partial_max, scale, num_kv_heads,
    keys, values, ids, log_weights, lengths, stand_ins, stand_in_ids,
    num_rows, num_splits, first_split,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ib, stride_il, stride_it, stride_wb, stride_wh, stride_wg, stride_wt,
    stride_lb, stride_lh, stride_rb, stride_rh, stride_rn, stride_jb, stride_jl, stride_jt,
    HEAD_DIM: tl.constexpr, HEADS_PER_LIST: tl.constexpr, LISTS_PER_KV_HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: one split of one id list of a part."""
    _attend_split(
        tl.program_id(1), query, stride_qb, stride_qh, partial_out, partial_sum, partial_max, scale, num_kv_heads,
        keys, values, ids, log_weights, lengths, stand_ins, stand_in_ids,
        num_rows, num_splits, first_split,
        stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
        stride_ib, stride_il, stride_it, stride_wb, stride_wh, stride_wg, stride_wt,
        stride_lb, stride_lh, stride_rb, stride_rh, stride_rn, stride_jb, stride_jl, stride_jt,
        HEAD_DIM, HEADS_PER_LIST, LISTS_PER_KV_HEAD, BLOCK_H, BLOCK_N, BLOCK_D, COMPUTE,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_VARYING, *(f"second_{name}" for name in _VARYING)])
def attend_pair_kernel(  # type: ignore[no-untyped-def]
    query, stride_qb, stride_qh, partial_out, partial_sum, partial_max, scale, num_kv_heads,
    keys, values, ids, log_weights, lengths, stand_ins, stand_in_ids,
    num_rows, num_splits, first_split,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ib, stride_il, stride_it, stride_wb, stride_wh, stride_wg, stride_wt,
    stride_lb, stride_lh, stride_rb, stride_rh, stride_rn, stride_jb, stride_jl, stride_jt,
    second_keys, second_values, second_ids, second_log_weights, second_lengths, second_stand_ins, second_stand_in_ids,
    second_num_rows, second_num_splits, second_first_split,
    second_stride_kb, second_stride_kh, second_stride_kn, second_stride_vb, second_stride_vh, second_stride_vn,
    second_stride_ib, second_stride_il, second_stride_it, second_stride_wb,
    second_stride_wh, second_stride_wg, second_stride_wt,
    second_stride_lb, second_stride_lh, second_stride_rb, second_stride_rh,
    second_stride_rn, second_stride_jb, second_stride_jl, second_stride_jt,
    HEAD_DIM: tl.constexpr, HEADS_PER_LIST: tl.constexpr, LISTS_PER_KV_HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: one split of one id list of a part, or of a second part, whose splits stand behind in the grid."""
    split = tl.program_id(1)
    if split < num_splits:
        _attend_split(
            split, query, stride_qb, stride_qh, partial_out, partial_sum, partial_max, scale, num_kv_heads,
            keys, values, ids, log_weights, lengths, stand_ins, stand_in_ids,
            num_rows, num_splits, first_split,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
            stride_ib, stride_il, stride_it, stride_wb, stride_wh, stride_wg, stride_wt,
            stride_lb, stride_lh, stride_rb, stride_rh, stride_rn, stride_jb, stride_jl, stride_jt,
            HEAD_DIM, HEADS_PER_LIST, LISTS_PER_KV_HEAD, BLOCK_H, BLOCK_N, BLOCK_D, COMPUTE,
        )  # fmt: skip
    else:
        _attend_split(
            split - num_splits, query, stride_qb, stride_qh, partial_out, partial_sum, partial_max, scale, num_kv_heads,
            second_keys, second_values, second_ids, second_log_weights,
            second_lengths, second_stand_ins, second_stand_in_ids,
            second_num_rows, second_num_splits, second_first_split,
            second_stride_kb, second_stride_kh, second_stride_kn,
            second_stride_vb, second_stride_vh, second_stride_vn,
            second_stride_ib, second_stride_il, second_stride_it, second_stride_wb,
            second_stride_wh, second_stride_wg, second_stride_wt,
            second_stride_lb, second_stride_lh, second_stride_rb, second_stride_rh,
            second_stride_rn, second_stride_jb, second_stride_jl, second_stride_jt,
            HEAD_DIM, HEADS_PER_LIST, LISTS_PER_KV_HEAD, BLOCK_H, BLOCK_N, BLOCK_D, COMPUTE,
        )  # fmt: skip


@triton.jit
def _attend_split(  # type: ignore[no-untyped-def]
    split, query, stride_qb, stride_qh, partial_out, partial_sum, partial_max, scale, num_kv_heads,
    keys, values, ids, log_weights, lengths, stand_ins, stand_in_ids,
    num_rows, num_splits, first_split,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ib, stride_il, stride_it, stride_wb, stride_wh, stride_wg, stride_wt,
    stride_lb, stride_lh, stride_rb, stride_rh, stride_rn, stride_jb, stride_jl, stride_jt,
    HEAD_DIM: tl.constexpr, HEADS_PER_LIST: tl.constexpr, LISTS_PER_KV_HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Writes the sums of weighted values [HEADS_PER_LIST, D] and of weights, both over exp(max), and this max, of
    partial split `first_split + split`.

    A list serves the HEADS_PER_LIST query heads of its kv head, or one of them.
    """
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
