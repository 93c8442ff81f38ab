"""The 8-bit copy of the keys: what it keeps, and search by it against the plain search and the flat oracle."""

from typing import Any

import pytest
import torch
from beam_oracle import beam_search
from torch import Tensor

from cache_hub.index import AttentionAwareGraphIndex, FlatIndex
from cache_hub.index.key_store import CompactKeys


def compact_index(keys: Tensor, queries: Tensor, extra: Tensor | None = None, **options: Any) -> Any:
    index = AttentionAwareGraphIndex(index_dtype="int8", **{"key_degree": 8, "key_links": 4, "q_knn": 6, **options})
    index.build(keys, queries, torch.arange(keys.shape[1]), extra)
    return index


def states(n: int, group: int = 3, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(n + dim)
    keys = (torch.randn(2, n, dim) + 5 * torch.randn(2, 1, dim)).to(dtype)
    return keys, torch.randn(2, group, n, dim) + torch.randn(2, 1, 1, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (2, 64), (63, 65), (257, 128)])
def test_keys_come_back_within_half_a_step(n: int, dim: int, dtype: torch.dtype) -> None:
    keys, _ = states(n, dim=dim, dtype=dtype)
    keys[0, n // 2] *= 100
    compact = CompactKeys.of(keys)
    error = (compact.scales[..., None] * compact.codes + compact.means[:, None] - keys.float()).abs()
    assert bool((error <= 0.501 * compact.scales[..., None] + 1e-5).all())
    assert compact.nbytes == 2 * n * dim + 2 * n * 4 + 2 * dim * 4


def test_keys_that_come_later_are_less_the_same_mean() -> None:
    keys, _ = states(100)
    grown = CompactKeys.of(keys[:, :60]).grown(keys)
    assert torch.equal(grown.means, CompactKeys.of(keys[:, :60]).means)
    assert torch.equal(grown.codes[:, :60], CompactKeys.of(keys[:, :60]).codes)
    error = (grown.scales[..., None] * grown.codes + grown.means[:, None] - keys.float()).abs()
    assert bool((error <= 0.501 * grown.scales[..., None] + 1e-5).all())


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_keys_have_codes_of_zero(value: float) -> None:
    compact = CompactKeys.of(torch.full((1, 5, 8), value))
    assert not compact.codes.any()
    assert not compact.scales.any()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("n", "group", "k", "ef"), [(1, 1, 3, 1), (63, 9, 5, 8), (500, 4, 7, 20), (500, 2, 30, 10)])
def test_search_walks_by_the_copy_and_ranks_by_the_store(n: int, group: int, k: int, ef: int, threads: int) -> None:
    keys, queries = states(n, group)
    index = compact_index(keys, queries, ef_search=ef, num_entries=4, num_threads=threads)
    asked = queries[:, :, -1].contiguous()
    found = index.search(asked, k)
    copy = index._compact.scales[..., None] * index._compact.codes
    width = min(max(ef, k), n)
    for row in range(2):
        for head in range(group):
            graph = (copy[row], index.adjacency[row], index.entries[row])
            beam, _, scored = beam_search(*graph, asked[row, head], width, ef)
            exact = keys[row].float() @ asked[row, head]
            expected = sorted(beam, key=lambda y, exact=exact: -float(exact[y]))[:k]  # type: ignore[misc]
            assert found.ids[row, head, : len(expected)].tolist() == expected
            assert found.ids[row, head, len(expected) :].tolist() == [-1] * (k - len(expected))
            torch.testing.assert_close(found.scores[row, head, : len(expected)], exact[expected], rtol=1e-5, atol=1e-4)
            assert int(found.keys_scored[row, head]) == scored + width


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("dim", [64, 80])
def test_a_beam_of_all_keys_is_exact(dim: int, lifted: bool) -> None:
    keys, queries = states(257, dim=dim)
    extra = torch.rand(2, 257) * 20 if lifted else None
    index, flat = compact_index(keys, queries, extra, ef_search=257), FlatIndex()
    flat.build(keys, queries, extra=extra)
    asked = queries[:, :, -1]
    found, exact = index.search(asked, 20), flat.search(asked, 20)
    assert torch.equal(found.ids, exact.ids)
    assert torch.equal(found.scores, exact.scores)
    assert bool((found.keys_scored == 2 * 257).all())


@pytest.mark.parametrize("huge", [False, True])
def test_little_is_lost_against_the_store(huge: bool) -> None:
    keys, queries = states(2003, group=8, dtype=torch.float32)
    if huge:
        keys[:, 1000] *= 1000
    options: dict[str, Any] = {"ef_search": 200, "key_degree": 32, "key_links": 16, "q_knn": 32}
    by_copy = compact_index(keys, queries, **options)
    by_store = AttentionAwareGraphIndex(index_dtype="auto", **options)
    by_store.build(keys, queries, torch.arange(2003))
    flat = FlatIndex()
    flat.build(keys, queries)
    asked = queries[:, :, -1]
    exact = flat.search(asked, 50).ids
    recalls = [
        (exact[..., None] == index.search(asked, 50).ids[..., None, :]).any(-1).float().mean().item()
        for index in (by_copy, by_store)
    ]
    assert recalls[1] > 0.9
    assert recalls[0] > recalls[1] - 0.01


def test_the_copy_is_counted_and_the_store_is_not_copied() -> None:
    keys, queries = states(100)
    index = compact_index(keys, queries, num_entries=16)
    assert index.keys is keys
    assert index.nbytes == 2 * 100 * 8 * 2 + 2 * 16 * 4 + index._compact.nbytes + index._metric.nbytes
