"""The native neighbour lists, by every product that this CPU runs: the best of all float32 scores, equal ones by id."""

import pytest
import torch
from torch import Tensor

from cache_hub.index import _native
from cache_hub.index.key_store import as_key_store
from cache_hub.index.knn import causal_knn, key_knn
from cache_hub.index.knn_backends import choose_backend
from cache_hub.index.native_knn import is_faster, native_topk

KERNELS = _native.tile_kernels()
each_kernel = pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)


def oracle(keys: Tensor, queries: Tensor, visible: Tensor, k: int) -> Tensor:
    """Lists by the scores that the native loops tell for every key, equal scores by id."""
    n = len(keys)
    store, all_ids, scores = as_key_store(keys[None]), torch.arange(n, dtype=torch.int32), torch.empty(n)
    lists = torch.full((len(queries), k), -1, dtype=torch.int32)
    for row, query, seen in zip(lists, queries.contiguous(), visible.tolist(), strict=True):
        _native.score(store, 0, query.data_ptr(), all_ids.data_ptr(), n, scores.data_ptr())
        best = scores[:seen].sort(descending=True, stable=True).indices[:k]
        row[: len(best)] = best.int()
    return lists


def states(kind: str, n: int, m: int, dim: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(n + dim)
    keys, queries = torch.randn(n, dim), torch.randn(m, dim)
    if kind == "duplicates":
        keys = keys[torch.arange(n) % 5]
    if kind == "all_equal":
        keys = keys[:1].expand(n, dim).contiguous()
    if kind == "zeros":
        keys, queries[::2] = torch.zeros(n, dim), 0.0
    if kind == "one_huge":
        keys[n // 2] *= 1e6
    if kind == "tiny":
        keys, queries = keys * 1e-20, queries * 1e-19
    if kind == "overflowing":
        keys[n // 3] *= 1e30
        queries[0] *= 1e30
    if kind == "cluster":  # cosines that bfloat16 does not tell apart
        keys = keys[:1] + 1e-4 * keys
        queries = keys[torch.arange(m) % n]
    return keys, queries


KINDS = ["random", "duplicates", "all_equal", "zeros", "one_huge", "tiny", "overflowing", "cluster"]


@each_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "m", "dim", "k"), [(1, 1, 1, 1), (2, 33, 7, 3), (31, 5, 64, 40), (700, 67, 65, 9), (1100, 40, 128, 100)]
)
def test_lists_are_the_best_of_all_scores(kernel: int, kind: str, n: int, m: int, dim: int, k: int) -> None:
    keys, queries = states(kind, n, m, dim)
    if kind == "overflowing":  # an infinite score is one like any other; none is not a number
        keys, queries = keys.abs(), queries.abs()
    visible = torch.randint(0, n + 1, (m,)).sort().values
    found, scored = native_topk(keys, queries, visible, k, kernel=kernel)
    assert torch.equal(found, oracle(keys, queries, visible, k))
    assert (found >= 0).sum() <= scored <= int(visible.sum()) + m * (max(4 * k, 128))


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keys_of_any_type_are_read_in_place(kernel: int, dtype: torch.dtype) -> None:
    """Rows begin at odd elements between nan, which would count as soon as something reads too far."""
    keys, queries = states("random", 300, 40, 70)
    held = torch.full((300, 75), float("nan"), dtype=dtype)
    held[:, 3:73] = keys.to(dtype)
    visible = torch.full((40,), 300)
    found, _ = native_topk(held[:, 3:73], queries, visible, 12, kernel=kernel)
    wide = keys.to(dtype) if dtype != torch.float64 else keys
    assert torch.equal(found, oracle(wide, queries, visible, 12))


@each_kernel
def test_few_candidates_are_scored(kernel: int) -> None:
    """Of 4,000 keys for each query; in a cluster the low parts of the numbers tell them apart."""
    keys, queries = states("random", 4000, 64, 64)
    cluster = keys[:1] + 1e-2 * keys
    for near, asked, most in ((keys, queries, 60), (cluster, cluster[:64], 300)):
        _, scored = native_topk(near, asked, torch.full((64,), 4000), 32, kernel=kernel)
        assert 32 * 64 <= scored <= most * 64


@each_kernel
def test_a_key_of_huge_norm_leaves_the_others_apart(kernel: int) -> None:
    keys, queries = states("one_huge", 4000, 64, 64)
    _, scored = native_topk(keys, queries, torch.full((64,), 4000), 32, kernel=kernel)
    assert scored <= 200 * 64


@each_kernel
@pytest.mark.parametrize("factor", [1.0, -0.37])
def test_one_more_dimension_equals_wider_vectors(kernel: int, factor: float) -> None:
    keys, queries = states("random", 500, 50, 64)
    extra, last = torch.randn(500) * 9, torch.full((50,), factor)
    visible = torch.arange(50) * 10 + 1
    found, _ = native_topk(keys, queries, visible, 20, (extra, last), kernel)
    scores = (torch.cat((queries, last[:, None]), 1).double() @ torch.cat((keys, extra[:, None]), 1).double().T).float()
    scores.masked_fill_(torch.arange(500) >= visible[:, None], float("-inf"))
    best = scores.topk(20).values
    assert torch.equal(found < 0, best == float("-inf"))
    ids = found.clamp(min=0).long()
    torch.testing.assert_close(scores.gather(1, ids)[found >= 0], best[found >= 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lists_are_the_same_for_any_threads_and_blocks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    store, queries = torch.randn(2, 800, 64).to(dtype), torch.randn(2, 2, 700, 64).to(dtype)
    keys, positions = store[:, :700], torch.arange(700) - 3
    results = [
        (
            causal_knn(keys, queries, positions, 16, block, "native", threads),
            key_knn(keys, 16, block, "native", threads),
        )
        for block, threads in ((4096, 1), (100, 3), (33, 2))
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_auto_is_native_where_the_cpu_has_the_instructions() -> None:
    assert KERNELS[-1] == "plain"
    assert is_faster() == (len(KERNELS) > 1)
    assert choose_backend("auto", torch.device("cpu")) == ("native" if is_faster() else "faiss")
    with pytest.raises(ValueError, match="got 'native' for states on meta, allowed there: 'auto', 'triton', 'torch'"):
        choose_backend("native", torch.device("meta"))
