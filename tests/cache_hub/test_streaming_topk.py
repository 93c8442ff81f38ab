"""The top-k on a GPU, by thresholds and by chunks, against a plain sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def scores_of(keys: Tensor, queries: Tensor, visible: Tensor, beside: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Of all keys, in float64 on the CPU, -inf where a query does not see them."""
    scores = queries.double().cpu() @ keys.double().cpu().T
    if beside is not None:
        scores += beside[1].double().cpu()[:, None] * beside[0].double().cpu()
    return scores.masked_fill_(torch.arange(len(keys)) >= visible.cpu()[:, None], float("-inf"))


def assert_best(ids: Tensor, scores: Tensor, tolerance: float = 0.0) -> None:
    """Lists [m, k] are the k best by scores [m, n], best first, each key once, padded where there are fewer."""
    ids, k = ids.cpu(), ids.shape[1]
    expected = torch.nn.functional.pad(scores, (0, max(k - scores.shape[1], 0)), value=float("-inf")).topk(k).values
    assert torch.equal(ids < 0, expected == float("-inf"))
    found = scores.gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, float("-inf"))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    for row in ids.tolist():
        there = [i for i in row if i >= 0]
        assert len(set(there)) == len(there)


@pytest.mark.parametrize("method", ["streaming_topk", "chunk_topk"])
@pytest.mark.parametrize(
    ("dtype", "beside"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
        (torch.float16, False),
    ],
)
@pytest.mark.parametrize(
    ("n", "m", "first", "dim", "k"),
    [
        (1, 1, 0, 64, 2),
        (63, 33, -5, 64, 8),
        (257, 37, 100, 128, 32),
        (1009, 35, 800, 80, 5),
        (1500, 17, 1300, 64, 40),
        (1900, 9, 1880, 256, 100),
    ],
)
def test_lists_are_the_k_best_that_a_query_sees(
    device: str, dtype: torch.dtype, beside: bool, method: str, n: int, m: int, first: int, dim: int, k: int
) -> None:
    from cache_hub.index import chunk_topk, streaming_topk

    torch.manual_seed(n)
    # Whole numbers: sums are exact in any order; most scores differ.
    keys = torch.randint(-9, 10, (n, dim)).to(device, dtype)
    queries = torch.randint(-9, 10, (m, dim)).to(device, dtype)
    visible = (torch.arange(m) + first + 1).clamp(0, n).int().to(device)
    more = torch.randint(-99, 100, (n,)).float().to(device), torch.randint(1, 3, (m,)).float().to(device)
    there = more if beside else None
    search = {"streaming_topk": streaming_topk.streaming_topk, "chunk_topk": chunk_topk.chunk_topk}[method]
    assert_best(search(keys, queries, visible, k, there), scores_of(keys, queries, visible, there))


def test_queries_may_come_in_any_order(device: str) -> None:
    """Heads of one kv head one after the other, in tiles that see very different numbers of keys."""
    from cache_hub.index.streaming_topk import streaming_topk

    torch.manual_seed(0)
    keys, queries = torch.randn(700, 64).to(device), torch.randn(140, 64).to(device)
    visible = torch.randint(0, 701, (140,)).int().to(device)
    assert_best(streaming_topk(keys, queries, visible, 5), scores_of(keys, queries, visible), 1e-4)


def awkward(name: str) -> tuple[Tensor, Tensor]:
    """Keys [n, 64] and queries [9, 64]."""
    torch.manual_seed(1)
    keys, queries = torch.randn(1200, 64), torch.randn(9, 64)
    if name == "equal keys":
        keys = torch.ones(1200, 64)
    elif name == "each key 60 times":
        keys = keys[:20].repeat(60, 1)
    elif name == "zero queries":
        queries = torch.zeros(9, 64)
    elif name == "zero keys":
        keys = torch.zeros(1200, 64)
    elif name == "sinks":
        keys[:4] *= 1000
    elif name == "the best in a row":
        keys[600:700] *= 20
    elif name == "the best in one column of eight":
        keys[::8] *= 20
    elif name == "closer than 16 bits":
        keys = torch.randn(1, 64) + 1e-5 * keys
    elif name == "tiny":
        keys *= 1e-12
    elif name == "huge":
        keys *= 1e15
    return keys, queries


AWKWARD = ["equal keys", "each key 60 times", "zero queries", "zero keys", "sinks", "the best in a row"]
AWKWARD += ["the best in one column of eight", "closer than 16 bits", "tiny", "huge"]


@pytest.mark.parametrize("name", AWKWARD)
def test_lists_are_exact_for_awkward_keys(device: str, name: str) -> None:
    """Up to the rounding of float32 sums, however many keys score alike."""
    from cache_hub.index.streaming_topk import streaming_topk

    keys, queries = awkward(name)
    visible = torch.full((len(queries),), len(keys), dtype=torch.int32)
    ids = streaming_topk(keys.to(device), queries.to(device), visible.to(device), 8)
    size = float(queries.norm(dim=1).max() * keys.norm(dim=1).max())
    assert_best(ids, scores_of(keys, queries, visible), 1e-6 * size)


def test_a_list_is_proven_or_failed(device: str) -> None:
    """Thresholds above the k-th best, far below it, and with room for few candidates in a list: what is not said to
    have failed is exact, and no failure goes unseen."""
    from cache_hub.index.streaming_topk import Tuning, first_try

    torch.manual_seed(2)
    keys, queries = torch.randn(1500, 64), torch.randn(40, 64)
    visible = torch.full((40,), 1500, dtype=torch.int32)
    scores = scores_of(keys, queries, visible)
    for rank, some, most in ((1, 1, 40), (8, 0, 0), (60, 40, 40)):
        found = first_try(keys.to(device), queries.to(device), visible.to(device), 30, None, Tuning(rank=rank))
        failed = found.failed.cpu()
        assert some <= int(failed.sum()) <= most
        assert_best(found.ids.cpu()[~failed], scores[~failed], 1e-4)
        counted = found.candidates.cpu()
        assert bool(failed[(counted < 30) | (counted > 512)].all())


def test_of_equal_scores_the_first_keys_are_listed(device: str) -> None:
    from cache_hub.index.streaming_topk import first_try

    keys, queries = torch.ones(200, 64).to(device), torch.ones(3, 64).to(device)
    visible = torch.tensor([5, 60, 90], dtype=torch.int32).to(device)
    found = first_try(keys, queries, visible, 4)
    assert not bool(found.failed.any())
    assert found.ids.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize(("width", "k"), [(1, 1), (63, 63), (100, 7), (1024, 32), (2050, 32)])
def test_largest_are_the_first_of_a_stable_sort(device: str, width: int, k: int) -> None:
    from cache_hub.index.chunk_topk import largest

    torch.manual_seed(width)
    # Ties within a row, both infinities, and rows of one value.
    scores = torch.randint(-40, 41, (9, width)) * 1e-3
    scores[:, ::5] = float("-inf")
    scores[3, ::7] = float("inf")
    scores[4:6] = torch.tensor([-1e30, float("-inf")])[:, None]
    expected = scores.argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values
    assert torch.equal(largest(scores.to(device), k).cpu().long(), expected)
