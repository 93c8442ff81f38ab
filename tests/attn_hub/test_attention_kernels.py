"""The Triton kernels against the float32 reference on ragged shapes, and their compilation for real GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import move, random_ids, random_store

from attn_hub import WeightedPart, weighted_decode_attention
from attn_hub.reference import reference_weighted_decode_attention


def _assert_agree(kernels, query, parts, tolerance=2e-6):
    expected = reference_weighted_decode_attention(query, parts)
    actual = kernels(query.to(kernels.device), move(parts, kernels.device)).cpu()
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", [1, 63, 127, 257])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_ragged_shapes(kernels, rows, group, head_dim):
    torch.manual_seed(rows * group + head_dim)
    batch, kv_heads = (2 if rows == 63 else 1), 2
    query = torch.randn(batch, 1, kv_heads * group, head_dim)
    keys, values = (random_store(batch, kv_heads, rows, head_dim) for _ in range(2))
    lengths = torch.randint(0, rows + 1, (batch, kv_heads), dtype=torch.int32)
    _assert_agree(kernels, query, [WeightedPart(keys, values)])
    _assert_agree(
        kernels,
        query,
        [
            WeightedPart(keys, values, lengths=lengths),
            WeightedPart(keys, values, random_ids(rows, batch, kv_heads, rows), torch.randn(batch, 1, rows)),
            WeightedPart(keys, values, random_ids(rows, batch, kv_heads * group, 17)),
        ],
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_half_precision_stays_within_its_rounding(kernels, dtype, tolerance, head_dim):
    torch.manual_seed(1)
    query = torch.randn(2, 1, 8, head_dim).to(dtype)
    keys, values = (random_store(2, 2, 200, head_dim, dtype) for _ in range(2))
    parts = [
        WeightedPart(keys, values, random_ids(200, 2, 2, 100), torch.randn(2, 2, 100, dtype=dtype)),
        WeightedPart(keys, values, lengths=torch.tensor([[200, 1], [0, 65]])),
    ]
    _assert_agree(kernels, query, parts, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_what_stand_ins_take_away_stays_within_rounding(kernels, dtype, tolerance):
    """Clusters of which most members are attended to exactly, with logits of some size."""
    torch.manual_seed(6)
    centroids = 2 * torch.randn(2, 2, 30, 64)
    cluster_of = torch.randint(0, 30, (2, 2, 300), dtype=torch.int32)
    members = cluster_of.long()[..., None].expand(-1, -1, -1, 64)
    keys = (centroids.gather(2, members) + 0.3 * torch.randn(2, 2, 300, 64)).to(dtype)
    values = random_store(2, 2, 300, 64, dtype)
    sizes = torch.zeros(2, 2, 30).scatter_add_(2, cluster_of.long(), torch.ones(2, 2, 300))
    means = torch.zeros(2, 2, 30, 64).scatter_add_(2, members, values.float()) / sizes.clamp(min=1)[..., None]
    ids = torch.arange(300, dtype=torch.int32).expand(2, 2, -1).clone()
    ids[..., ::7] = -1
    parts = [
        WeightedPart(centroids.to(dtype), means.to(dtype), log_weights=sizes.log()),
        WeightedPart(keys, values, ids, stand_ins=centroids.to(dtype), stand_in_ids=cluster_of),
    ]
    _assert_agree(kernels, torch.randn(2, 1, 8, 64).to(dtype), parts, tolerance)


def test_a_group_wider_than_a_tile_and_a_strided_query(kernels):
    torch.manual_seed(2)
    query = torch.randn(1, 1, 64, 34).transpose(2, 3)
    parts = [WeightedPart(*(random_store(1, 2, 65, 64) for _ in range(2)), random_ids(65, 1, 2, 40))]
    _assert_agree(kernels, query, parts)


def test_results_do_not_change_between_calls(kernels):
    torch.manual_seed(3)
    query = torch.randn(1, 1, 8, 64, device=kernels.device)
    parts = move([WeightedPart(*(random_store(1, 2, 257, 64) for _ in range(2)))], kernels.device)
    assert torch.equal(kernels(query, parts), kernels(query, parts))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_pinned_host_memory(dtype):
    torch.manual_seed(4)
    query = torch.randn(2, 1, 8, 128).to(dtype)
    host = [random_store(2, 2, 500, 128, dtype) for _ in range(2)]
    ids = random_ids(500, 2, 2, 300)
    pinned = WeightedPart(host[0].pin_memory(), host[1].pin_memory(), ids.cuda())
    out = weighted_decode_attention(query.cuda(), [pinned]).cpu()
    expected = reference_weighted_decode_attention(query, [WeightedPart(*host, ids)])
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_unpinned_host_rows_are_refused():
    query, store = torch.randn(1, 1, 4, 64, device="cuda"), random_store(1, 2, 10, 64)
    with pytest.raises(ValueError, match=r"keys are on cpu, must be on cuda:0 or, for CUDA, be pinned"):
        weighted_decode_attention(query, [WeightedPart(store, store)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_call_can_be_captured_in_a_cuda_graph():
    torch.manual_seed(5)
    query = torch.randn(1, 1, 8, 64, device="cuda")
    part = WeightedPart(
        *(random_store(1, 2, 300, 64).cuda() for _ in range(2)),
        lengths=torch.full((1, 2), 10, dtype=torch.int32, device="cuda"),
    )
    weighted_decode_attention(query, [part])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = weighted_decode_attention(query, [part])
    part.lengths.fill_(290)
    graph.replay()
    expected = reference_weighted_decode_attention(query, [part])
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)


def test_kernels_compile_for_ampere_and_hopper(tmp_path):
    """Without a GPU: the interpreter accepts what the compiler refuses. A process for each, side by side."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root)}
    script = Path(__file__).with_name("compile_kernels.py")
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), capability],
            env=environment | {"TRITON_CACHE_DIR": str(tmp_path / capability)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for capability in ("80", "90")
    ]
    told = [run.communicate(timeout=900)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
