"""Check and time the weighted decode kernels on one GPU: dense rows, rows gathered from GPU and pinned host memory.

    python -m benchmark.decode.weighted_decode --output weighted_decode.json
    python -m benchmark.decode.weighted_decode --smoke      # correctness only, tiny; interpreted without a GPU

Every kernel result is first compared with the float32 reference on fresh random inputs; a mismatch stops the run.
Times are medians of triton.testing.do_bench with a cold L2: `call_ms` is the Python call, host work included where the
GPU waits for it, `device_ms` a call's share of a CUDA graph of 8 calls, as layers follow each other in a decode step,
each with rows or ids of its own, the merge of its splits included. GB/s counts the K and V bytes of the attended rows
once; beside it stands the copy bandwidth measured in the same run.
"""

import argparse
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_hub import WeightedPart
from attn_hub.reference import reference_weighted_decode_attention
from benchmark.results import check_writable, environment, write_json

KV_HEADS, GROUP, HEAD_DIM, DTYPE = 8, 4, 128, torch.bfloat16
DENSE_TOKENS = (13_107, 32_768, 131_072)
GATHERED_ROWS = (256, 400, 2_048, 4_096)
GATHER_STORE_ROWS = 131_072
COPY_BYTES = 1 << 30
CALLS = 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check_kernels(device: str, sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> list[dict[str, Any]]:
    """Largest |kernel - reference| / max(1, |reference|) of each case; SystemExit where it exceeds TOLERANCE."""
    from attn_hub.kernels.weighted_decode import triton_weighted_decode_attention

    results = []
    for dtype in dtypes:
        for rows in sizes:
            for head_dim, group in ((64, 3), (HEAD_DIM, GROUP)):
                query = torch.randn(2, 1, 2 * group, head_dim, device=device).to(dtype)
                for name, parts in _cases(device, rows, group, head_dim, dtype).items():
                    actual = triton_weighted_decode_attention(query, parts)
                    expected = reference_weighted_decode_attention(query, [_on(device, part) for part in parts])
                    difference = (actual.float() - expected.float()).abs()
                    error = (difference / expected.float().abs().clamp(min=1)).max().item()
                    case = {"case": name, "rows": rows, "head_dim": head_dim, "group": group, "dtype": str(dtype)}
                    results.append(case | {"max_error": error})
                    if not error <= TOLERANCE[dtype]:
                        raise SystemExit(f"kernel and reference differ: {results[-1]}, allowed {TOLERANCE[dtype]}")
    return results


def _cases(device: str, rows: int, group: int, head_dim: int, dtype: torch.dtype) -> dict[str, list[WeightedPart]]:
    keys, values = (torch.randn(2, 2, rows, head_dim).to(device, dtype) for _ in range(2))
    ids = torch.randint(-1, rows, (2, 2, rows), dtype=torch.int32, device=device)
    head_ids = torch.randint(-1, rows, (2, 2 * group, rows // 2 + 1), dtype=torch.int32, device=device)
    lengths = torch.randint(0, rows + 1, (2, 2), dtype=torch.int32, device=device)
    cases = {
        "dense": [WeightedPart(keys, values)],
        "lengths": [WeightedPart(keys, values, lengths=lengths)],
        "gather": [WeightedPart(keys, values, ids, torch.randn(2, 2 * group, rows, device=device))],
        "gather per query head": [WeightedPart(keys, values, head_ids)],
    }
    if device == "cuda":
        cases["gather pinned"] = [WeightedPart(keys.cpu().pin_memory(), values.cpu().pin_memory(), ids)]
    return cases | {"all parts": [part for parts in cases.values() for part in parts]}


def _on(device: str, part: WeightedPart) -> WeightedPart:
    return WeightedPart(part.keys.to(device), part.values.to(device), part.ids, part.log_weights, part.lengths)


def measure() -> dict[str, Any]:
    """Copy bandwidths and the time of every case, in ms and GB/s (1e9 bytes)."""
    gpu_copy, host_copy = _copy_bandwidth(pinned=False), _copy_bandwidth(pinned=True)
    print(f"copy within GPU memory {gpu_copy:.0f} GB/s (read + write), pinned host to GPU {host_copy:.1f} GB/s")
    query = torch.randn(1, 1, KV_HEADS * GROUP, HEAD_DIM, device="cuda", dtype=DTYPE)
    timings = []
    for tokens in DENSE_TOKENS:
        dense = [WeightedPart(*(_random_store(tokens) for _ in range(2))) for _ in range(CALLS)]
        timings.append({"case": "dense", "rows": tokens} | _time(query, dense, gpu_copy))
        del dense
    keys, values = (_random_store(GATHER_STORE_ROWS) for _ in range(2))
    pinned = keys.cpu().pin_memory(), values.cpu().pin_memory()
    sources = (("gather from GPU memory", (keys, values), gpu_copy), ("gather from pinned memory", pinned, host_copy))
    for name, store, bandwidth in sources:
        for rows in GATHERED_ROWS:
            gathered = [WeightedPart(*store, _random_ids(rows)) for _ in range(CALLS)]
            timings.append({"case": name, "rows": rows} | _time(query, gathered, bandwidth))
    for row in timings:
        print(
            f"{row['case']:<32}{row['rows']:>8} rows  device {row['device_ms']:.4f} ms  call {row['call_ms']:.4f} ms  "
            f"{row['gb_per_s']:8.1f} GB/s  {row['share_of_copy']:.0%} of the copy's"
        )
    return {"gpu_copy_gb_per_s": gpu_copy, "host_to_gpu_gb_per_s": host_copy, "timings": timings}


def _random_store(rows: int) -> Tensor:
    return torch.randn(1, KV_HEADS, rows, HEAD_DIM, device="cuda", dtype=DTYPE)


def _random_ids(rows: int) -> Tensor:
    ids = torch.stack([torch.randperm(GATHER_STORE_ROWS)[:rows] for _ in range(KV_HEADS)])
    return ids.to("cuda", torch.int32).unsqueeze(0)


def _time(query: Tensor, parts: list[WeightedPart], copy_gb_per_s: float) -> dict[str, float]:
    from attn_hub.kernels.weighted_decode import triton_weighted_decode_attention

    part = parts[0]
    call_ms = _median_ms(lambda: triton_weighted_decode_attention(query, [part]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in parts:
            triton_weighted_decode_attention(query, [one])
    device_ms = _median_ms(graph.replay) / len(parts)
    moved = 2 * KV_HEADS * part.num_rows * HEAD_DIM * part.keys.element_size()
    rate = moved / device_ms / 1e6
    return {
        "device_ms": device_ms, "call_ms": call_ms, "bytes": moved,
        "gb_per_s": rate, "share_of_copy": rate / copy_gb_per_s,
    }  # fmt: skip


def _copy_bandwidth(pinned: bool) -> float:
    """GB/s of a 1 GiB copy: bytes read + written within GPU memory, bytes moved from pinned host memory."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cpu" if pinned else "cuda", pin_memory=pinned)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    milliseconds = _median_ms(lambda: target.copy_(source, non_blocking=True))
    return COPY_BYTES * (1 if pinned else 2) / milliseconds / 1e6


def _median_ms(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(function, return_mode="median")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--seed", type=int, help="of the random inputs; a fresh one is drawn if not given")
    parser.add_argument("--smoke", action="store_true", help="only check correctness, at tiny sizes")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device; only --smoke runs without one")
    if arguments.output is not None:
        check_writable(arguments.output)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it is imported, below
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    torch.manual_seed(seed)
    sizes = (1, 63, 130) if arguments.smoke else (1, 63, 1_000, 20_011)
    dtypes = (torch.float32,) if device == "cpu" else tuple(TOLERANCE)
    checks = check_kernels(device, sizes, dtypes)
    worst = {str(dtype): max(c["max_error"] for c in checks if c["dtype"] == str(dtype)) for dtype in dtypes}
    print(f"{len(checks)} cases agree with the reference (seed {seed}); largest errors {worst}")
    results = {"checks": checks} | ({} if arguments.smoke else measure())
    if arguments.output is not None:
        config = {
            "seed": seed, "smoke": arguments.smoke, "batch": 1, "kv_heads": KV_HEADS, "group": GROUP,
            "head_dim": HEAD_DIM, "dtype": str(DTYPE), "gather_store_rows": GATHER_STORE_ROWS,
            "calls_of_a_graph": CALLS,
        }  # fmt: skip
        write_json(arguments.output, {"config": config, "environment": environment(), "results": results})


if __name__ == "__main__":
    main()
