"""Compile all kernels for the capabilities given, 80 and 90; run without a GPU and without Triton's interpreter."""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attn_hub.kernels.copy_rows import copy_rows_kernel
from attn_hub.kernels.hand_over import append_token_kernel, post_kernel
from attn_hub.kernels.rotate import rotate_kernel
from attn_hub.kernels.weighted_rows import attend_pair_kernel, attend_rows_kernel, merge_splits_kernel
from cache_hub.cluster_kernels import nearest_centroid_kernel, sum_members_kernel
from cache_hub.eviction.blocked_kernels import (
    LOG_SUMS,
    LONG_LOG_SUMS,
    LONG_SPREAD,
    SPREAD,
    chain_kernel,
    invert_kernel,
    join_kernel,
    log_sums_kernel,
    received_kernel,
)
from cache_hub.eviction.walk_kernels import GROUP, walk_kernel
from cache_hub.index.chunk_topk import chunk_maxima_kernel, chunk_scores_kernel, largest_kernel
from cache_hub.index.co_occurrence_kernels import first_from_kernel, nearest_in_lists_kernel
from cache_hub.index.projection import pair_scores_kernel, prune_fill_kernel
from cache_hub.index.prune_kernels import bound_kernel, rank_clusters_kernel, scan_chosen_kernel
from cache_hub.index.scan_kernels import scan_kernel, select_kernel, unite_kernel
from cache_hub.index.streaming_topk import Tuning
from cache_hub.index.topk_kernels import LISTS, expand_kernel, hits_kernel, rank_kernel, score_kernel, threshold_kernel

# Shared memory of one program: sm_86 and sm_89 have 99 KiB, the least of all GPUs since Ampere.
SHARED_MEMORY_LIMIT = 99 * 1024


def compile_kernel(
    kernel: triton.JITFunction, capability: int, types: dict[str, str], constants: dict, **options: int
) -> None:
    """types: argument -> pointer or float type (all others are i32); constants: argument -> value."""
    if str(capability) not in sys.argv[1:]:
        return
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    positions = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, positions)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    if compiled.metadata.shared > SHARED_MEMORY_LIMIT:
        raise SystemExit(f"{kernel.__name__} on sm_{capability}: {compiled.metadata.shared} B of shared memory")


def compile_attend(capability: int, store: str, block_rows: int, head_dim: int, *parts: dict[str, str]) -> None:
    """parts: the optional arguments of one part, or of two that share a launch."""
    compute = {"*bf16": tl.bfloat16, "*fp32": tl.float32}[store]
    constants = {"HEAD_DIM": head_dim, "HEADS_PER_LIST": 4, "LISTS_PER_KV_HEAD": 1, "COMPUTE": compute}
    constants |= {"BLOCK_H": 16, "BLOCK_N": block_rows, "BLOCK_D": triton.next_power_of_2(head_dim)}
    types = {"query": store, "scale": "fp32", "partial_out": "*fp32", "partial_sum": "*fp32", "partial_max": "*fp32"}
    for prefix, optional in zip(("", "second_"), parts, strict=False):
        absent = {"ids", "log_weights", "lengths", "stand_ins", "stand_in_ids"} - optional.keys()
        constants |= {prefix + name: None for name in absent}
        types |= {prefix + name: kind for name, kind in ({"keys": store, "values": store} | optional).items()}
    compile_kernel(attend_rows_kernel if len(parts) == 1 else attend_pair_kernel, capability, types, constants)


def compile_topk(capability: int, dtype: str, dim: int, beside: str | None) -> None:
    """The kernels of streaming_topk for keys of a type, whose products are in 16 bits."""
    half = "*fp16" if dtype == "*fp32" else dtype
    room, shrink = 512, max(dim // 128, 1)
    given = {"beside_queries": beside, "beside_keys": beside, "beside_sampled": beside}
    absent = {name: value for name, value in given.items() if value is None}
    types = {"queries": half, "keys": half, "sampled": half, "sample_ids": "*i32", "visible": "*i32", "order": "*i32"}
    types |= {"thresholds": "*fp32", "hits": "*i64", "counts": "*i32", "ids": "*i32", "totals": "*i32"}
    types |= {"ranked": "*i64", "floors": "*fp32", "out": "*i32", "failed": "*i1"}
    types |= {name: value for name, value in given.items() if value is not None}
    sizes = {"DIM": dim, "BLOCK_D": dim, "COMPUTE": tl.float16 if half == "*fp16" else tl.bfloat16, "ROOM": room}
    sizes |= {"CAPACITY": room // LISTS, "SLOTS": 64 // shrink, "BLOCK_C": 32, "LOG_Q": 2, "LOG_C": 7, "LOG_K": 5}
    for kernel, tile, options in (
        (threshold_kernel, Tuning.threshold, {}),
        (hits_kernel, Tuning.hits, {"maxnreg": 128}),
        (expand_kernel, None, {}),
        (score_kernel, None, {}),
        (rank_kernel, None, {}),
    ):
        here = sizes | {"BLOCK_N": 128 // shrink}
        if tile is not None:
            here |= {"BLOCK_M": tile.queries // shrink, "BLOCK_N": tile.keys // shrink, "STAGES": tile.stages}
            options = {"num_warps": max(tile.warps // shrink, 4), "num_stages": tile.stages, **options}
        constants = {name: value for name, value in (here | absent).items() if name in kernel.arg_names}
        exact = types | {"queries": dtype, "keys": dtype} if kernel is score_kernel else types
        compile_kernel(kernel, capability, exact, constants, **options)


def compile_scan(capability: int, dim: int, group: int, run: int, maxima: int) -> None:
    """The kernels of device_scan."""
    types = {"query": "*bf16", "codes": "*i8", "scales": "*fp32", "scores": "*fp32", "maxima": "*fp32", "ring": "*bf16"}
    types |= dict.fromkeys(("lengths", "ids", "chosen_runs", "assignment", "positions", "clusters", "steps"), "*i32")
    types |= {"counts": "*i64"}
    sizes = {
        "DIM": dim,
        "GROUP": group,
        "BLOCK_N": 128,
        "BLOCK_D": triton.next_power_of_2(dim),
        "RUN": run,
        "STAGES": 3,
    }
    sizes |= {"BLOCK_R": maxima, "WIDTH": 128, "LOG_K": 7}
    absent = {"places": None, "tokens": None}
    for kernel, warps, heads in ((scan_kernel, 4, max(group, 8)), (select_kernel, 16, group), (unite_kernel, 4, group)):
        constants = {
            name: value for name, value in (sizes | absent | {"BLOCK_G": heads}).items() if name in kernel.arg_names
        }
        compile_kernel(kernel, capability, types, constants, num_warps=warps)


def compile_pruned(capability: int, dim: int, group: int, run: int, clusters: int) -> None:
    """The kernels of pruned_scan, and that of device_scan that shares its slots."""
    names = ("starts", "wanted", "bounds", "places", "ends", "counts", "lengths", "ids", "tokens", "assignment")
    types = dict.fromkeys((*names, "positions", "steps"), "*i32")
    types |= {"query": "*bf16", "centroids": "*bf16", "codes": "*i8", "scanned": "*i64"}
    types |= dict.fromkeys(("scales", "ranks", "scores", "maxima"), "*fp32")
    sizes = {"DIM": dim, "GROUP": group, "BLOCK_D": triton.next_power_of_2(dim), "EVERY": 1, "BLOCK": clusters}
    sizes |= {"BLOCK_N": 128, "RUN": run, "STAGES": 3, "COMPUTE": tl.bfloat16}
    for kernel, warps, heads, block in (
        (rank_clusters_kernel, 4, max(group, 16), 64),
        (bound_kernel, 16, group, 1),
        (scan_chosen_kernel, 4, max(group, 8), 128),
    ):
        given = sizes | {"BLOCK_G": heads, "BLOCK_C": block}
        constants = {name: value for name, value in given.items() if name in kernel.arg_names}
        compile_kernel(kernel, capability, types, constants, num_warps=warps)
    united = {"DIM": dim, "GROUP": group, "BLOCK_G": group, "BLOCK_D": triton.next_power_of_2(dim), "LOG_K": 7}
    unite_types = types | {"counts": "*i64", "clusters": "*i32"}
    compile_kernel(unite_kernel, capability, unite_types, united | {"ring": None}, num_warps=4)


def compile_chain(capability: int, dtype: str, dim: int, starts: int) -> None:
    """The kernels of the blocked chain, with the tiles of a type and row."""
    narrow = dim * {"*bf16": 2, "*fp32": 4}[dtype] <= 256
    given = dict.fromkeys(("query", "key"), dtype)
    given |= dict.fromkeys(("total", "others", "shift", "inverse", "mass", "given", "received"), "*fp32")
    given |= {"progress": "*i32", "scale": "fp32"}
    sizes = {
        "DIM": dim,
        "BLOCK_D": dim,
        "COMPUTE": {"*bf16": tl.bfloat16, "*fp32": tl.float32}[dtype],
        "STARTS": starts,
    }
    sums, spread = (LOG_SUMS, SPREAD) if narrow else (LONG_LOG_SUMS, LONG_SPREAD)
    halves = {"HALF": spread.columns // 2, "num_warps": 4 if narrow else 8}
    for kernel, tiles in (
        (log_sums_kernel, sums.options()),
        (invert_kernel, halves),
        (join_kernel, halves),
        (chain_kernel, spread.options()),
        (received_kernel, spread.options()),
    ):
        types = {name: kind for name, kind in given.items() if name in kernel.arg_names}
        constants = {name: value for name, value in (sizes | tiles).items() if name in kernel.arg_names}
        options = {name: value for name, value in tiles.items() if name.startswith("num_")}
        compile_kernel(kernel, capability, types, constants, **options)


if __name__ == "__main__":
    compile_attend(80, "*bf16", 64, 128, {"lengths": "*i32"})
    compile_attend(90, "*bf16", 64, 80, {"ids": "*i32", "log_weights": "*fp32"})
    compile_attend(90, "*fp32", 32, 128, {"ids": "*i64"})
    compile_attend(90, "*bf16", 16, 128, {"ids": "*i32", "stand_ins": "*bf16", "stand_in_ids": "*i32"})
    compile_attend(90, "*fp32", 32, 128, {"ids": "*i32", "stand_ins": "*fp32", "stand_in_ids": "*i32"})
    for capability in (80, 90):
        compile_attend(capability, "*bf16", 64, 128, {"lengths": "*i32"}, {"log_weights": "*fp32"})
    compile_attend(80, "*fp32", 32, 128, {"lengths": "*i32"}, {"ids": "*i64", "log_weights": "*fp32"})
    merge_types = {"partial_out": "*fp32", "partial_sum": "*fp32", "partial_max": "*fp32", "out": "*bf16"}
    compile_kernel(merge_splits_kernel, 80, merge_types, {"HEAD_DIM": 80, "BLOCK_S": 32, "BLOCK_D": 128})
    copy_types = {"source": "*bf16", "target": "*bf16", "source_ids": "*i64", "target_ids": "*i64"}
    compile_kernel(copy_rows_kernel, 80, copy_types, {"HEAD_DIM": 80, "BLOCK_N": 32, "BLOCK_D": 128})
    append_types = dict.fromkeys(("keys", "values", "key", "value"), "*bf16") | {"lengths": "*i32"}
    compile_kernel(append_token_kernel, 80, append_types, {"HEAD_DIM": 80, "BLOCK_D": 128})
    compile_kernel(post_kernel, 80, {"source": "*bf16", "target": "*fp32"}, {"BLOCK": 1024})
    rotate_types = dict.fromkeys(("states", "cos", "sin", "out"), "*bf16")
    compile_kernel(rotate_kernel, 80, rotate_types, {"HALF": 40, "BLOCK_H": 64, "BLOCK_D": 64})
    prune_types = {"keys": "*bf16", "candidates": "*i64", "scores": "*fp32", "begin": "*i64", "links": "*i32"}
    compile_chain(80, "*fp32", 128, 2)
    compile_chain(90, "*bf16", 128, 1)
    for capability in (80, 90):
        compile_scan(capability, 128, 4, 32, 4096)
        compile_scan(capability, 80, 8, 64, 8192)
        compile_pruned(capability, 128, 4, 32, 1 << 14)
        compile_pruned(capability, 80, 8, 64, 1 << 10)
        for width, dim in ((16, 64), (32, 256)):
            compile_kernel(prune_fill_kernel, capability, prune_types, {"BLOCK_W": width, "BLOCK_D": dim})
        for beside in ("*fp32", None):
            compile_topk(capability, "*bf16", 128, beside)
            compile_topk(capability, "*fp32", 256, beside)
        for dtype, tile, dim in (("*bf16", 128, 128), ("*fp32", 64, 128), ("*fp32", 32, 256)):
            types = {"queries": dtype, "keys": dtype, "visible": "*i32"}
            tiles = {"BLOCK_D": dim, "CHUNK": 32}
            compute = {"*bf16": tl.bfloat16, "*fp32": tl.float32}[dtype]
            maxima = {"BLOCK_M": tile, "BLOCK_N": tile, "COMPUTE": compute, **tiles}
            runs = types | {"chunks": "*i32", "scores": "*fp32"}
            for beside in ("*fp32", None):
                more = dict.fromkeys(("beside_queries", "beside_keys"), beside)
                given, absent = ({}, more) if beside is None else (more, {})
                compile_kernel(chunk_maxima_kernel, capability, types | {"maxima": "*fp32"} | given, maxima | absent)
                compile_kernel(chunk_scores_kernel, capability, runs | given, {"BLOCK_C": 128, **tiles, **absent})
        for block in (1, 1024):
            compile_kernel(largest_kernel, capability, {"scores": "*fp32", "out": "*i32"}, {"BLOCK": block})
        for dim, tile in ((128, 128), (256, 64)):
            nearest = {"points": "*fp32", "centroids": "*fp16", "offsets": "*fp32", "scale": "*fp32", "best": "*i32"}
            sizes = {"DIM": dim, "BLOCK_M": tile, "BLOCK_N": tile // 2, "BLOCK_D": dim, "COMPUTE": tl.float16}
            compile_kernel(nearest_centroid_kernel, capability, nearest, sizes | {"STAGES": 3}, num_warps=tile // 16)
        members = {"points": "*bf16", "order": "*i64", "begin": "*i64", "sums": "*fp32"}
        compile_kernel(sum_members_kernel, capability, members, {"DIM": 80, "BLOCK_M": 16, "BLOCK_D": 128}, num_warps=2)
        lists = {"by_time": "*i32", "places": "*i64", "links": "*i32"}
        named = dict.fromkeys(("order", "begin", "wanted", "found"), "*i64")
        for width in (32, 128):
            sizes = {"LISTS": 3, "ROWS": 4, "BLOCK_K": width}
            compile_kernel(nearest_in_lists_kernel, capability, lists, sizes, num_warps=2)
        compile_kernel(first_from_kernel, capability, named | {"count": "i64"}, {"BLOCK": 256})
        pairs = {"keys": "*bf16", "node": "*i64", "candidate": "*i64", "scores": "*fp32"}
        compile_kernel(pair_scores_kernel, capability, pairs, {"BLOCK_P": 32, "BLOCK_D": 128})
        walks = {"cumulative": "*i32", "starts": "*i32", "absorbing": "*u8", "counts": "*i64"}
        for seed in ("i32", "i64"):
            sizes = {"GROUP": GROUP, "ROUNDS": 15}
            compile_kernel(walk_kernel, capability, walks | {"seed": seed}, sizes, num_warps=GROUP // 32)
