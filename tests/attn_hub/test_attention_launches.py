"""Parts that are read alike share a launch, two by two, and give what the reference gives."""

import pytest
import torch
from attention_cases import move, random_ids, random_store

from attn_hub import WeightedPart, decode_splits
from attn_hub.reference import reference_weighted_decode_attention

HKV = 2
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def launches(monkeypatch):
    """The grids of the kernels launched since, each with the number of parts that it reads."""
    weighted_decode = pytest.importorskip("attn_hub.kernels.weighted_decode")
    seen: list[tuple[int, tuple[int, int]]] = []

    class Counted:
        def __init__(self, kernel, parts):
            self.kernel, self.parts = kernel, parts

        def __getitem__(self, grid):
            seen.append((self.parts, grid))
            return self.kernel[grid]

    for parts, name in ((1, "attend_rows_kernel"), (2, "attend_pair_kernel")):
        monkeypatch.setattr(weighted_decode, name, Counted(getattr(weighted_decode, name), parts))
    return seen


def _contiguous(batch, rows, head_dim=64, dtype=torch.float32, kv_heads=HKV, **fields):
    keys, values = (random_store(batch, kv_heads, rows, head_dim, dtype) for _ in range(2))
    return WeightedPart(keys, values, **fields)


def _lengths(batch, rows):
    return torch.randint(0, rows + 1, (batch, HKV), dtype=torch.int32)


def _splits(kernels, query, parts):
    from attn_hub.kernels.weighted_decode import TritonSplits

    return TritonSplits(query.to(kernels.device), move(parts, kernels.device))


def _agree(kernels, query, parts):
    expected = reference_weighted_decode_attention(query, parts)
    tolerance = TOLERANCES[query.dtype]
    actual = _splits(kernels, query, parts).merge().cpu()
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(("batch", "group"), [(1, 1), (2, 3), (3, 4)])
def test_two_ragged_parts_in_one_launch(kernels, launches, batch, group, head_dim):
    """Tokens counted by lengths, and rows with log weights, per query head or kv head; either of them first."""
    dtype = list(TOLERANCES)[(batch + head_dim // 40) % 3]
    torch.manual_seed(100 * group + head_dim)
    query = torch.randn(batch, 1, HKV * group, head_dim).to(dtype)
    for rows, clusters, heads in ((63, 131, HKV * group), (193, 1, HKV), (1, 67, 1)):
        parts = [
            _contiguous(batch, rows, head_dim, dtype, lengths=_lengths(batch, rows)),
            _contiguous(batch, clusters, head_dim, dtype, log_weights=torch.randn(batch, heads, clusters)),
        ]
        launches.clear()
        _agree(kernels, query, parts if rows > 1 else parts[::-1])
        assert [count for count, _ in launches] == [2]


@pytest.mark.parametrize("group", [1, 3, 4])
def test_gathered_rows_share_with_contiguous_ones(kernels, launches, group):
    torch.manual_seed(group)
    query, store = torch.randn(2, 1, HKV * group, 64), random_store(2, HKV, 97, 64)
    stood_in = random_ids(30, 2, HKV, 67)
    parts = [
        _contiguous(2, 63, lengths=_lengths(2, 63)),
        WeightedPart(store, -store, random_ids(97, 2, HKV, 67, dtype=torch.int64), torch.randn(67)),
        _contiguous(2, 30, log_weights=3 + torch.rand(2, HKV, 30)),
    ]
    clusters = parts[2]
    parts.append(
        WeightedPart(store, -store, stood_in, stand_ins=clusters.keys * 0.5, stand_in_ids=stood_in, log_weights=None)
    )
    for ordered in (parts, parts[::-1], parts[:3], [parts[3], parts[2], parts[1]]):
        launches.clear()
        _agree(kernels, query, ordered)
        assert [count for count, _ in launches] == ([2, 2] if len(ordered) == 4 else [2, 1])


def test_a_part_of_lengths_0_in_a_shared_launch(kernels, launches):
    torch.manual_seed(7)
    query, none = torch.randn(3, 1, 6, 64), torch.zeros(3, HKV, dtype=torch.int32)
    empty, other = _contiguous(3, 70, lengths=none), _contiguous(3, 131, log_weights=torch.randn(131))
    for parts in ([empty, other], [other, empty], [empty, empty]):
        launches.clear()
        _agree(kernels, query, parts)
        assert [count for count, _ in launches] == [2]


def test_parts_without_rows_are_not_launched(kernels, launches):
    torch.manual_seed(8)
    query, nothing = torch.randn(1, 1, 6, 64), _contiguous(1, 0)
    first, second = _contiguous(1, 63), _contiguous(1, 127, log_weights=torch.randn(127))
    _agree(kernels, query, [nothing, first, nothing, second])
    assert [count for count, _ in launches] == [2]
    launches.clear()
    _agree(kernels, query, [nothing, first])
    assert [count for count, _ in launches] == [1]
    launches.clear()
    _agree(kernels, query, [nothing])
    assert launches == []


def test_a_shared_grid_holds_the_splits_of_both(kernels, launches):
    torch.manual_seed(9)
    query, parts = torch.randn(2, 1, 6, 64), [_contiguous(2, 1), _contiguous(2, 300)]
    for part in parts:
        _agree(kernels, query, [part])
    _agree(kernels, query, parts)
    (_, (lists, one)), (_, (_, other)), shared = launches
    assert shared == (2, (lists, one + other))


def test_what_is_read_otherwise_has_a_launch_of_its_own(kernels, launches):
    """Lists of query heads beside those of kv heads, other kv heads, other tiles."""
    torch.manual_seed(10)
    query, store = torch.randn(1, 1, 6, 128), random_store(1, HKV, 50, 128)
    per_query_head = WeightedPart(store, store, random_ids(50, 1, 6, 20))
    one_kv_head = _contiguous(1, 50, 128, kv_heads=1)
    half = _contiguous(1, 50, 128, torch.bfloat16)
    here = _contiguous(1, 63, 128)
    for other in (per_query_head, one_kv_head, half):
        launches.clear()
        _agree(kernels, query, [here, other])
        assert [count for count, _ in launches] == [1, 1]
    launches.clear()
    _agree(kernels, query, [here, half, per_query_head, half, here])
    assert [count for count, _ in launches] == [2, 2, 1]


def test_a_decode_step_has_two_launches_and_the_merge(kernels, launches):
    """Static tokens and clusters at once, what is retrieved later."""
    torch.manual_seed(11)
    query, store = torch.randn(1, 1, 6, 64), random_store(1, HKV, 90, 64)
    parts = [
        _contiguous(1, 100, lengths=_lengths(1, 100)),
        _contiguous(1, 40, log_weights=torch.rand(1, HKV, 40)),
        WeightedPart(store, store, random_ids(90, 1, HKV, 33)),
    ]
    splits = _splits(kernels, query, parts)
    splits.attend(2)
    splits.attend(1)
    assert [count for count, _ in launches] == [2]
    result = splits.merge().cpu()
    assert [count for count, _ in launches] == [2, 1]
    torch.testing.assert_close(result, reference_weighted_decode_attention(query, parts), atol=2e-6, rtol=2e-6)


def test_parts_are_read_when_they_are_attended_to(kernels):
    """The early ones as they are then, the last with the ids that were written meanwhile."""
    torch.manual_seed(13)
    query, source = torch.randn(2, 1, 6, 64), _contiguous(2, 200)
    clusters, ids = _contiguous(2, 50, log_weights=torch.rand(2, HKV, 50)), random_ids(200, 2, HKV, 65)
    expected = reference_weighted_decode_attention(
        query, [source, clusters, WeightedPart(source.keys, source.values, ids)]
    )
    source, clusters = move([source, clusters], kernels.device)
    late = torch.full_like(source.keys, float("nan"))
    wanted = torch.full((2, HKV, 65), -1, dtype=torch.int32, device=kernels.device)
    parts = [WeightedPart(late, source.values), clusters, WeightedPart(source.keys, source.values, wanted)]
    splits = _splits(kernels, query, parts)
    late.copy_(source.keys)
    splits.attend(2)
    late.fill_(float("nan"))
    wanted.copy_(ids)
    torch.testing.assert_close(splits.merge().cpu(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_host_rows_do_not_share_with_rows_of_the_gpu(launches):
    torch.manual_seed(12)
    query, here, there = torch.randn(1, 1, 8, 64), _contiguous(1, 90), _contiguous(1, 200)
    ids = random_ids(200, 1, HKV, 77)
    contiguous = WeightedPart(there.keys.pin_memory(), there.values.pin_memory())
    gathered = WeightedPart(contiguous.keys, contiguous.values, ids.cuda())
    result = decode_splits(query.cuda(), [*move([here], "cuda"), contiguous, gathered]).merge().cpu()
    assert [count for count, _ in launches] == [1, 1, 1]
    expected = reference_weighted_decode_attention(query, [here, there, WeightedPart(there.keys, there.values, ids)])
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_shared_launch_can_be_captured_in_a_cuda_graph():
    torch.manual_seed(13)
    query = torch.randn(2, 1, 8, 64, device="cuda")
    parts = [_contiguous(2, 300, lengths=_lengths(2, 20)), _contiguous(2, 131, log_weights=torch.rand(131))]
    parts = move(parts, "cuda")
    decode_splits(query, parts).merge()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_splits(query, parts).merge()
    parts[0].lengths.fill_(290)
    parts[1].log_weights.neg_()
    graph.replay()
    torch.testing.assert_close(out, reference_weighted_decode_attention(query, parts), atol=2e-6, rtol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_other_numbers_of_rows_compile_nothing():
    from attn_hub.kernels.weighted_rows import attend_pair_kernel

    torch.manual_seed(14)
    query, store = torch.randn(1, 1, 8, 64, device="cuda"), _contiguous(1, 3000)
    compiled = attend_pair_kernel.device_caches[torch.cuda.current_device()][0]
    counts = set()
    for rows, clusters in ((1, 1), (16, 160), (333, 77), (2999, 3000)):
        of_clusters = store.keys[:, :, :clusters], store.values[:, :, :clusters]
        parts = [
            WeightedPart(store.keys[:, :, :rows], store.values[:, :, :rows]),
            WeightedPart(*of_clusters, log_weights=torch.rand(1, HKV, clusters)),
        ]
        decode_splits(query, move(parts, "cuda")).merge()
        counts.add(len(compiled))
    assert len(counts) == 1
