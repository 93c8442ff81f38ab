"""The neighbour lists that graphs are built from are exact, causal and padded, for any shape and backend."""

import pytest
import torch

from cache_hub.index import knn
from cache_hub.index.knn import causal_knn, exact_topk, key_knn, listed_queries


def brute_force(keys: torch.Tensor, queries: torch.Tensor, positions: torch.Tensor | None, k: int) -> torch.Tensor:
    """Lists by a full masked score matrix: [R, g, M, k] scores, -inf pads."""
    scores = queries.double() @ keys.double().transpose(1, 2)[:, None]
    if positions is not None:
        scores.masked_fill_(torch.arange(keys.shape[1]) > positions[:, None], float("-inf"))
    k_here = min(k, keys.shape[1])
    best = scores.topk(k_here).values
    return torch.nn.functional.pad(best, (0, k - k_here), value=float("-inf"))


@pytest.mark.parametrize("backend", ["native", "faiss", "torch"])
@pytest.mark.parametrize(
    ("n", "m", "first", "group", "dim", "k", "block"),
    [
        (1, 1, 0, 1, 64, 2, 4096),
        (63, 70, -5, 3, 64, 8, 16),
        (257, 331, -4, 4, 128, 32, 100),
        (1009, 1100, -4, 1, 64, 32, 4096),
        (600, 400, 150, 3, 64, 5, 173),
    ],
)
def test_causal_lists_equal_brute_force(
    backend: str, n: int, m: int, first: int, group: int, dim: int, k: int, block: int
) -> None:
    torch.manual_seed(n)
    keys, queries = torch.randn(2, n, dim), torch.randn(2, group, m, dim)
    positions = torch.arange(m) + first
    lists = causal_knn(keys, queries, positions, k, block, backend)
    assert lists.dtype == torch.int32
    assert bool(((lists < 0) | (lists <= positions[:, None])).all())
    expected = brute_force(keys, queries, positions, k)
    assert torch.equal(lists < 0, expected == float("-inf"))
    found = (queries.double() @ keys.double().transpose(1, 2)[:, None]).gather(3, lists.clamp(min=0).long())
    torch.testing.assert_close(found[lists >= 0], expected[lists >= 0], rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in lists.view(-1, k).tolist() if -1 not in row)


def test_queries_without_positions_see_every_key() -> None:
    torch.manual_seed(0)
    keys, queries = torch.randn(1, 300, 64), torch.randn(1, 2, 40, 64)
    lists = causal_knn(keys, queries, None, 7)
    assert torch.equal(lists.long(), (queries @ keys[:, None].transpose(2, 3)).topk(7).indices)


@pytest.mark.parametrize(("queries", "stride"), [(0, 3), (1, 5), (4096, 7), (4097, 2), (9001, 4), (9001, 1)])
def test_all_late_queries_are_listed_and_of_those_before_every_stride_th(queries: int, stride: int) -> None:
    kept = [i for i in range(queries) if queries - i <= knn.ALWAYS_LISTED or (queries - 1 - i) % stride == 0]
    assert listed_queries(queries, stride).tolist() == kept


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("backend", ["native", "faiss", "torch", pytest.param("triton", marks=[pytest.mark.gpu, GPU])])
@pytest.mark.parametrize(
    ("n", "m", "group", "dim", "stride"),
    [(1, 1, 1, 64, 2), (63, 70, 3, 64, 3), (257, 331, 4, 128, 4), (257, 331, 1, 64, 400)],
)
def test_lists_by_stride_are_those_of_all_queries(
    monkeypatch: pytest.MonkeyPatch, backend: str, n: int, m: int, group: int, dim: int, stride: int
) -> None:
    """With positions, some of queries that see no key, and without; with one more dimension and without."""
    monkeypatch.setattr(knn, "ALWAYS_LISTED", 20)
    torch.manual_seed(n + stride)
    device = "cuda" if backend == "triton" else "cpu"
    keys, queries = torch.randn(2, n, dim, device=device), torch.randn(2, group, m, dim, device=device)
    kept = listed_queries(m, stride).to(device)
    assert m == 1 or 0 < len(kept) < m
    for positions in (torch.arange(m) - 4, None):
        for extra in (torch.randn(2, n), None):
            given = (keys, queries, positions, 9, 50, backend)
            part = causal_knn(*given, extra=extra, stride=stride)
            assert torch.equal(part, causal_knn(*given, extra=extra)[:, :, kept])


@pytest.mark.parametrize("backend", ["native", "faiss", "torch"])
@pytest.mark.parametrize("n", [1, 2, 63, 257])
def test_key_lists_are_the_nearest_by_centred_cosine_without_the_key_itself(backend: str, n: int) -> None:
    torch.manual_seed(n)
    keys = torch.randn(2, n, 64) + 5
    lists = key_knn(keys, 8, block=100, backend=backend)
    assert lists.shape == (2, n, min(8, n - 1))
    centred = torch.nn.functional.normalize(keys - keys.mean(1, keepdim=True), dim=2)
    cosines = centred @ centred.transpose(1, 2)
    cosines.diagonal(dim1=1, dim2=2).fill_(-2)
    expected = cosines.topk(min(8, n - 1)).values
    torch.testing.assert_close(cosines.gather(2, lists.long()), expected)


def test_key_lists_of_equal_keys_never_name_the_key_itself() -> None:
    lists = key_knn(torch.ones(1, 40, 64), 8)
    assert lists.shape == (1, 40, 8)
    assert not bool((lists[0] == torch.arange(40)[:, None]).any())


@pytest.mark.parametrize("backend", ["native", "faiss", "torch", pytest.param("triton", marks=[pytest.mark.gpu, GPU])])
def test_one_more_dimension_equals_wider_vectors(backend: str) -> None:
    """Whole numbers: sums are exact in any order."""
    torch.manual_seed(0)
    device = "cuda" if backend == "triton" else "cpu"
    keys, queries = torch.randint(-9, 10, (2, 150, 64)).float(), torch.randint(-9, 10, (2, 3, 60, 64)).float()
    extra, positions = torch.randint(-200, 201, (2, 150)).float(), torch.arange(60) + 90
    wide = torch.cat((keys, extra[..., None]), 2)
    ids = causal_knn(keys, queries.to(device), positions, 9, backend=backend, extra=extra).cpu().long()
    scores = torch.nn.functional.pad(queries, (0, 1), value=1.0) @ wide[:, None].transpose(2, 3)
    scores.masked_fill_(torch.arange(150) > positions[:, None], float("-inf"))
    assert torch.equal(scores.gather(3, ids), scores.topk(9).values)
    ids = key_knn(keys.to(device), 9, backend=backend, extra=extra).cpu().long()
    centred = torch.nn.functional.normalize(wide - wide.mean(1, keepdim=True), dim=2)
    cosines = centred @ centred.transpose(1, 2)
    cosines.diagonal(dim1=1, dim2=2).fill_(-2)
    torch.testing.assert_close(cosines.gather(2, ids), cosines.topk(9).values)


def test_exact_topk_pads_when_k_exceeds_the_keys() -> None:
    scores, ids = exact_topk(torch.randn(2, 3, 64), torch.randn(2, 4, 64), 5)
    assert ids.shape == (2, 4, 5)
    assert bool((ids[..., 3:] == -1).all())
    assert bool((scores[..., 3:] == float("-inf")).all())


def test_unknown_backend_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"knn_backend: got 'annoy', allowed: 'auto', 'native', 'faiss', 'triton', 'torch'"
    ):
        causal_knn(torch.randn(1, 4, 64), torch.randn(1, 1, 4, 64), None, 2, backend="annoy")
