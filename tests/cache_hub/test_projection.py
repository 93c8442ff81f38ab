"""The projection for GPUs makes the graph that the native code makes."""

import pytest
import torch


@pytest.mark.parametrize("projection", ["co_occurrence", "roargraph"])
@pytest.mark.parametrize(
    ("n", "group", "dim", "key_links"), [(1, 1, 64, 4), (2, 3, 64, 4), (63, 4, 128, 4), (97, 3, 80, 0), (120, 3, 64, 8)]
)
def test_links_equal_the_native_ones(
    device: str, n: int, group: int, dim: int, key_links: int, projection: str
) -> None:
    from cache_hub.index import make_index
    from cache_hub.index.knn import causal_knn, key_knn
    from cache_hub.index.projection import project

    torch.manual_seed(n)
    # Whole numbers: every order of summation gives the same product, and there are ties.
    keys = torch.randint(-2, 3, (2, n, dim)).float()
    queries = torch.randint(-2, 3, (2, group, n, dim)).float()
    options = {"key_degree": 8, "key_links": key_links, "q_knn": 12, "projection": projection, "key_metric": "cosine"}
    native = make_index("attention_aware_graph", **options)
    native.build(keys, queries, torch.arange(n))
    by_query = causal_knn(keys, queries, torch.arange(n), 12)
    by_key = key_knn(keys, 8 if key_links else 0)
    there = (tensor.to(device) for tensor in (keys, by_query, by_key))
    links = project(*there, 8, 8 - key_links, projection == "co_occurrence").cpu()
    if native.repaired_keys == 0:
        assert torch.equal(links, native.adjacency)
    else:
        assert int((links != native.adjacency).any(2).sum()) <= native.repaired_keys


def chance(key: int, sample: int) -> int:
    mixed = (key * 2654435761 + sample * 2246822519) % 2**32
    mixed = ((mixed ^ mixed >> 15) * 2246822519) % 2**32
    return (mixed ^ mixed >> 13) >> 16


def plain_co_occurrence(lists: torch.Tensor, n: int, width: int) -> list[list[int]]:
    """What csrc/co_occurrence.h says, for lists [g, M, k] of one row."""
    group, queries, k = lists.shape
    by_time = [[i for i in lists[head, m].tolist() if i >= 0] for m in range(queries) for head in range(group)]
    links = []
    for key in range(n):
        naming = [number for number, ids in enumerate(by_time) if key in ids]
        weights: dict[int, int] = {}
        for number in naming[-3:]:
            rank = by_time[number].index(key)
            for j, other in enumerate(by_time[number]):
                if other != key:
                    weights[other] = weights.get(other, 0) + 131072 // (2 + abs(j - rank)) + k - j
        near = sorted(weights, key=lambda other: (-weights[other], other))[:width]
        last, first, pivots = len(by_time) - 1, key * len(by_time) // n, []
        for i in range(width // 2):
            u = (i * 65536 + chance(key, i)) // (width // 2)
            due = last - ((last - first) * (u * u // 65536)) // 65536
            before = [number for number in naming if number <= due]
            if before:
                pivots += [other for other in by_time[before[-1]][:2] if other != key][:1]
        half = (width + 1) // 2
        best = list(dict.fromkeys(near[:half] + pivots + near[half:]))[:width]
        links.append(best + [-1] * (width - len(best)))
    return links


@pytest.mark.parametrize(
    ("n", "group", "queries", "k", "width"), [(1, 1, 1, 2, 3), (2, 3, 5, 2, 1), (63, 4, 63, 8, 5), (151, 3, 97, 12, 8)]
)
def test_co_occurrence_is_the_plain_one(n: int, group: int, queries: int, k: int, width: int) -> None:
    """Lists without a repeated key, some short and some empty; both implementations, the native one through a build
    whose degree leaves no room for other links and whose every key is an entry, so that none is repaired."""
    from cache_hub.index import _native
    from cache_hub.index.co_occurrence import co_occurrence_links
    from cache_hub.index.key_store import as_key_store

    torch.manual_seed(n)
    lists = torch.full((1, group, queries, k), -1, dtype=torch.int32)
    for row in lists.flatten(0, 2):
        count = int(torch.randint(0, min(k, n) + 1, ()))
        row[:count] = torch.randperm(n)[:count].int()
    expected = plain_co_occurrence(lists[0], n, width)
    assert co_occurrence_links(lists[0], n, width).tolist() == expected
    keys, links = torch.zeros(1, n, 4), torch.empty(1, n, width, dtype=torch.int32)
    entries, none = torch.empty(1, n, dtype=torch.int32), torch.empty(1, n, 0, dtype=torch.int32)
    where = (links.data_ptr(), entries.data_ptr())
    store, by_key = as_key_store(keys), (none.data_ptr(), 0)
    _native.build(store, lists.data_ptr(), group, queries, k, *by_key, width, width, True, n, 2, *where)
    assert links[0].tolist() == expected


@pytest.mark.parametrize(
    ("n", "count", "k", "width"), [(1, 1, 2, 3), (2, 15, 2, 1), (63, 252, 8, 5), (151, 291, 12, 8), (90, 200, 33, 8)]
)
def test_kernels_of_co_occurrence_do_what_torch_does(device: str, n: int, count: int, k: int, width: int) -> None:
    """The two steps alone, and all of it, for lists of which some are short and some empty."""
    from cache_hub.index import co_occurrence, co_occurrence_kernels

    torch.manual_seed(n)
    by_time = torch.full((count, k), -1, dtype=torch.int32)
    for row in by_time:
        filled = int(torch.randint(0, min(k, n) + 1, ()))
        # Some keys are in nearly every list, some in none.
        weights = torch.linspace(0, 1, n) ** 4 + 1e-6
        row[:filled] = weights.multinomial(filled).int() if filled else row[:0]
    named, order = by_time.flatten().flip(0).sort(stable=True)
    begin = torch.searchsorted(named, torch.arange(n + 1, dtype=torch.int32))
    wanted = torch.randint(0, count + 1, (n, 4))
    places = co_occurrence._latest_places(order, begin)
    there = [states.to(device) for states in (by_time, order, begin, wanted, places)]
    near = co_occurrence_kernels.nearest_in_lists(there[0], there[4], n, width)
    assert torch.equal(near.cpu(), co_occurrence.nearest_in_lists(by_time, places, n, width))
    found = co_occurrence_kernels.first_from(there[1], there[2], there[3], k)
    expected = co_occurrence.first_from(order, begin, wanted, k)
    own = [range(int(begin[key]), int(begin[key + 1])) for key in range(n)]
    plain = [
        [next((at for at in own[key] if order[at] // k >= least), own[key].stop) for least in row]
        for key, row in enumerate(wanted.tolist())
    ]
    assert found.tolist() == expected.tolist() == plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_co_occurrence_on_a_gpu_is_that_on_a_cpu() -> None:
    from cache_hub.index.co_occurrence import co_occurrence_links

    torch.manual_seed(0)
    lists = torch.rand(3, 2000, 1500).argsort(2)[..., :32].int()
    lists[:, :100, 20:] = -1
    assert torch.equal(co_occurrence_links(lists.cuda(), 1500, 8).cpu(), co_occurrence_links(lists, 1500, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_index_built_on_a_gpu_finds_what_the_one_built_on_a_cpu_finds() -> None:
    from cache_hub.index import make_index

    torch.manual_seed(0)
    keys, queries = torch.randn(2, 3000, 64), torch.randn(2, 3, 3000, 64)
    found = []
    for device in ("cpu", "cuda"):
        index = make_index("attention_aware_graph", index_dtype="auto")
        index.build(keys, queries.to(device), torch.arange(3000))
        found.append(index.search(queries[:, :, -1], 100).ids)
    same = (found[0][..., :, None] == found[1][..., None, :]).any(-1).float().mean()
    assert same > 0.99
