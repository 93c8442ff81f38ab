"""The graph's structure (degree, reachability, determinism) and its search against the flat oracle."""

import multiprocessing
import os
from typing import Any

import pytest
import torch
from beam_oracle import beam_search
from graph_checks import check_structure, reachable

from cache_hub.diagnosis import unite
from cache_hub.index import AttentionAwareGraphIndex, FlatIndex, _native, knn, make_index
from cache_hub.index.key_store import as_key_store
from cache_hub.index.links import PackedLinks


def build(n: int, group: int = 3, dim: int = 64, rows: int = 2, dtype: torch.dtype = torch.float32, **options: Any):
    """An index over n keys whose queries lie away from them, as attention's do."""
    torch.manual_seed(n * 7 + dim)
    keys = (torch.randn(rows, n, dim) + torch.randn(rows, 1, dim)).to(dtype)
    queries = (0.5 * torch.randn(rows, group, n, dim) + torch.randn(rows, 1, 1, dim)).to(dtype)
    index = AttentionAwareGraphIndex(**{"index_dtype": "auto", **options})
    index.build(keys, queries, torch.arange(n))
    return index, keys, queries


@pytest.mark.parametrize("key_links", [0, 3, 8])
@pytest.mark.parametrize(("n", "group", "dim"), [(1, 1, 64), (2, 3, 64), (63, 3, 64), (257, 4, 128), (1009, 1, 64)])
def test_structure(n: int, group: int, dim: int, key_links: int) -> None:
    index, _, _ = build(n, group, dim, key_degree=8, key_links=key_links, q_knn=6, num_entries=4)
    check_structure(index, n, degree=8)


def test_every_key_is_reachable_where_query_links_alone_leave_islands() -> None:
    index, _, _ = build(500, key_degree=2, key_links=0, q_knn=2, num_entries=1)
    assert index.repaired_keys > 0, "the case is not the hard one it should be"
    assert all(len(reachable(index, row)) == 500 for row in range(2))


def test_entries_are_the_keys_that_the_last_queries_rank_first() -> None:
    index, keys, queries = build(900, group=3, rows=1, num_entries=8)
    seen = torch.arange(900)[None, :] <= torch.arange(900)[:, None]
    first = (queries[0] @ keys[0].T).masked_fill(~seen, float("-inf")).argmax(-1)
    latest = dict.fromkeys(first.T.flatten().flip(0).tolist())
    assert index.entries[0].tolist() == list(latest)[:8]


@pytest.mark.parametrize("projection", ["co_occurrence", "roargraph"])
@pytest.mark.parametrize(("n", "group", "dim", "stride"), [(1, 1, 64, 2), (63, 3, 64, 3), (257, 4, 128, 5)])
def test_query_stride_makes_the_graph_of_the_listed_queries(
    monkeypatch: pytest.MonkeyPatch, n: int, group: int, dim: int, stride: int, projection: str
) -> None:
    """Links and entries; the metric of the key links stays that of all queries."""
    monkeypatch.setattr(knn, "ALWAYS_LISTED", 20)
    options: dict[str, Any] = {"key_degree": 8, "key_links": 4, "q_knn": 6, "num_entries": 8, "projection": projection}
    strided, keys, queries = build(n, group, dim, **options, query_stride=stride, key_metric="cosine")
    kept = knn.listed_queries(n, stride)
    alone = AttentionAwareGraphIndex(**options, index_dtype="auto", key_metric="cosine", query_stride=1)
    alone.build(keys, queries[:, :, kept], kept)
    assert torch.equal(strided.adjacency, alone.adjacency)
    assert torch.equal(strided.entries, alone.entries)
    full, _, _ = build(n, group, dim, **options, query_stride=1)
    other, _, _ = build(n, group, dim, **options, query_stride=stride)
    assert torch.equal(full._metric.root, other._metric.root)
    check_structure(other, n, degree=8)
    fewer = 4 * 2 * group * (n - len(kept)) * 6
    assert full.build_bytes(2, group, n, n, dim) - other.build_bytes(2, group, n, n, dim) == fewer


@pytest.mark.parametrize("other_threads", [2, 5])
def test_same_graph_for_any_thread_count(other_threads: int) -> None:
    one, _, queries = build(700, num_threads=1)
    many, _, _ = build(700, num_threads=other_threads)
    assert torch.equal(one.adjacency, many.adjacency)
    assert torch.equal(one.entries, many.entries)
    a, b = one.search(queries[:, :, -1], 50), many.search(queries[:, :, -1], 50)
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.keys_scored, b.keys_scored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "dim"), [(63, 64), (257, 128), (257, 80)])
def test_search_with_a_beam_of_all_keys_is_exact(n: int, dim: int, dtype: torch.dtype) -> None:
    index, keys, queries = build(n, 4, dim, dtype=dtype, key_degree=8, key_links=4, ef_search=n)
    flat = FlatIndex()
    flat.build(keys, queries)
    asked = queries[:, :, -1].float()
    found, exact = index.search(asked, n), flat.search(asked, n)
    torch.testing.assert_close(found.scores, exact.scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.ids.sort().values, exact.ids.sort().values)
    assert bool((found.keys_scored == n).all())


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "group", "dim", "k", "ef"), [(1, 1, 64, 3, 1), (63, 9, 128, 5, 8), (500, 4, 65, 7, 20)])
def test_search_is_the_plain_one(
    n: int, group: int, dim: int, k: int, ef: int, dtype: torch.dtype, threads: int
) -> None:
    """Whole numbers: sums are exact in any order, and many scores are equal. Groups of several sizes share a thread."""
    torch.manual_seed(n)
    keys = torch.randint(-2, 3, (2, n, dim)).to(dtype)
    index = make_index("attention_aware_graph", key_degree=6, key_links=3, q_knn=5, num_entries=4, num_threads=threads)
    index.options = index.options.model_copy(update={"index_dtype": "auto", "ef_search": ef})
    index.build(keys, torch.randint(-2, 3, (2, group, n, dim)).float(), torch.arange(n))
    queries = torch.randint(-2, 3, (2, group, dim)).float()
    found = index.search(queries, k)
    for row in range(2):
        for head in range(group):
            graph = (keys[row], index.adjacency[row], index.entries[row])
            ids, scores, scored = beam_search(*graph, queries[row, head], k, ef)
            assert found.ids[row, head].tolist() == ids
            assert found.scores[row, head].tolist() == scores
            assert int(found.keys_scored[row, head]) == scored


def test_a_search_starts_from_near_keys_too() -> None:
    """Those of all query heads of a kv head, as from further entries; and from the keys after a head's own first 20. -1
    pads are left out; a beam of 1 from a far entry alone stays where it is."""
    torch.manual_seed(0)
    keys, queries = torch.randint(-2, 3, (2, 300, 16)).float(), torch.randint(-2, 3, (2, 3, 16)).float()
    index = make_index("attention_aware_graph", key_degree=4, key_links=2, q_knn=4, num_entries=2, ef_search=1)
    index.build(keys, torch.randint(-2, 3, (2, 3, 300, 16)).float(), torch.arange(300))
    near = torch.randint(0, 300, (2, 3, 40), dtype=torch.int32)
    near[0, 1, 3:] = -1
    near[0, 2, 0] = 299
    near[..., 30:] = -1
    near[0, 0] = -1
    found = index.search(queries, 1, near)
    for row in range(2):
        for head in range(3):
            after = near[row, head, :20][near[row, head, :20] >= 0] + 1
            starts = torch.cat((near[row].flatten(), after[after < 300], index.entries[row]))
            ids, _, scored = beam_search(keys[row], index.adjacency[row], starts, queries[row, head], 1, 1)
            assert (found.ids[row, head].tolist(), int(found.keys_scored[row, head])) == (ids, scored)
    best = (queries[:, :, None] * keys[:, None]).sum(-1).argmax(-1)[..., None].int()
    assert bool((index.search(queries, 1, best).scores >= found.scores).all())


@pytest.mark.parametrize(
    ("near", "told"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(2, 2, 4, dtype=torch.int32), "[2, 2, 4]"),
        (torch.full((2, 3, 1), 63, dtype=torch.int32), "63 to 63"),
        (torch.full((2, 3, 1), -2, dtype=torch.int32), "-2 to -2"),
    ],
)
def test_near_keys_that_cannot_be(near: torch.Tensor, told: str) -> None:
    index, _, queries = build(63, key_degree=8, key_links=4)
    with pytest.raises(ValueError, match="near: got") as caught:
        index.search(queries[:, :, -1], 5, near)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("n", "degree", "segments"), [(65_535, 6, 1), (65_536, 6, 2), (70_000, 6, 2), (140_000, 8, 3), (70_000, 3, 0)]
)
def test_ids_of_every_layout_are_searched(n: int, degree: int, segments: int) -> None:
    """Random links, some rows short: their making would take too long."""
    torch.manual_seed(0)
    keys, queries = torch.randint(-2, 3, (1, n, 8)).float(), torch.randint(-2, 3, (1, 3, 8)).float()
    index, _, _ = build(9, group=3, dim=8, rows=1, key_degree=degree, key_links=3, num_entries=4, ef_search=30)
    links = random_links(1, n, PackedLinks.capacity(n, degree))
    index.keys, index.links, index._store = keys, PackedLinks.pack(links, degree), as_key_store(keys)
    assert index.links.segments == segments
    found = index.search(queries, 10)
    for head in range(3):
        ids, scores, scored = beam_search(keys[0], links[0], index.entries[0], queries[0, head], 10, 30)
        assert (found.ids[0, head].tolist(), found.scores[0, head].tolist()) == (ids, scores)
        assert int(found.keys_scored[0, head]) == scored


def random_links(rows: int, n: int, degree: int) -> torch.Tensor:
    """Among n keys, the last one often, every third key with few, every seventh with none."""
    links = torch.randint(0, n, (rows, n, degree), dtype=torch.int32)
    links[:, :: max(n // 50, 1), 0] = n - 1
    links[:, ::3, degree // 2 :] = -1
    links[:, ::7] = -1
    return links


@pytest.mark.parametrize(("n", "slots"), [(1, 4), (63, 1), (65_535, 5), (65_536, 4), (131_073, 12), (300_000, 12)])
def test_packed_links_come_back(n: int, slots: int) -> None:
    torch.manual_seed(n)
    links = random_links(2, n, PackedLinks.capacity(n, slots))
    packed = PackedLinks.pack(links, slots)
    assert packed.data.shape == (2, n, slots)
    assert packed.data.nbytes == 2 * 2 * n * slots
    back = packed.unpack()
    assert torch.equal((back >= 0).sum(2), (links >= 0).sum(2))
    assert torch.equal(back.sort(2).values[..., -links.shape[2] :], links.sort(2).values)


def test_a_graph_of_more_keys_than_16_bits_name() -> None:
    torch.manual_seed(0)
    n, options = 66_000, {"key_degree": 8, "key_links": 0, "q_knn": 8, "num_entries": 8}
    keys, queries = torch.randn(1, n, 8), torch.randn(1, 2, 300, 8)
    index = make_index("attention_aware_graph", index_dtype="auto", **options)
    index.build(keys, queries, None)
    links = index.adjacency
    assert index.nbytes == n * 8 * 2 + 8 * 4
    assert int((links >= 0).sum(2).max()) == PackedLinks.capacity(n, 8) == 7
    assert int(links.max()) >= 65_536
    assert reachable(index, 0) == set(range(n))


@pytest.mark.parametrize(("rows", "width", "highest"), [(1, 1, 5), (3, 63, 20), (2, 300, 100_000), (4, 127, 3)])
def test_union_has_every_id_once_in_the_order_met(rows: int, width: int, highest: int) -> None:
    torch.manual_seed(width)
    ids = torch.randint(-1, highest, (rows, width), dtype=torch.int32)
    ids[-1] = -1 if rows > 1 else ids[-1]
    out = torch.empty_like(ids)
    counts = _native.unite(ids.data_ptr(), rows, width, 7, out.data_ptr())
    for row, count, positions, united in zip(ids.tolist(), counts, out.tolist(), unite(ids).tolist(), strict=True):
        expected = [y + 7 for y in dict.fromkeys(row) if y >= 0]
        assert positions == expected + [-1] * (width - count)
        assert sorted(expected) == [y + 7 for y in united if y >= 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_searches_though_torchs_threads_stay_behind() -> None:
    index, _, queries = build(400, num_threads=torch.get_num_threads())
    expected = index.search(queries[:, :, 0], 5).ids.tolist()

    def child() -> None:
        os._exit(0 if index.search(queries[:, :, 0], 5).ids.tolist() == expected else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=30)
    process.kill()
    assert process.exitcode == 0


def test_results_are_sorted_and_padded_when_k_exceeds_the_keys() -> None:
    index, _, queries = build(9, key_degree=4, key_links=2)
    found = index.search(queries[:, :, -1], 12)
    assert bool((found.ids[..., 9:] == -1).all())
    assert bool((found.scores[..., 9:] == float("-inf")).all())
    assert bool((found.scores[..., :8] >= found.scores[..., 1:9]).all())


def test_keys_scored_counts_every_inner_product_once() -> None:
    index, _, queries = build(1009, ef_search=20, num_entries=16)
    narrow = index.search(queries[:, :, -1], 10).keys_scored
    assert bool((narrow >= 16).all())
    assert bool((narrow < 1009).all())


def test_recall_grows_with_the_beam() -> None:
    recalls = []
    for ef in (10, 80, 640):
        index, keys, queries = build(2003, rows=1, ef_search=ef)
        flat = FlatIndex()
        flat.build(keys, queries)
        asked = queries[:, :, -1]
        found, exact = index.search(asked, 10).ids, flat.search(asked, 10).ids
        recalls.append((exact[..., None] == found[..., None, :]).any(-1).float().mean().item())
    assert recalls == sorted(recalls)
    assert recalls[-1] > 0.95


@pytest.mark.parametrize(("index_dtype", "copies"), [("auto", 0), ("float32", 0), ("bfloat16", 1), ("float16", 1)])
def test_nbytes_counts_links_entries_the_metric_and_a_copy_of_the_keys(index_dtype: str, copies: int) -> None:
    index, keys, _ = build(100, key_degree=8, key_links=4, num_entries=16, index_dtype=index_dtype)
    dim = keys.shape[2]
    assert index.nbytes == 2 * 100 * 8 * 2 + 2 * 16 * 4 + 2 * (dim + dim * dim) * 4 + copies * keys.numel() * 2


def test_search_reads_a_store_with_gaps_between_rows_in_place() -> None:
    torch.manual_seed(1)
    store = torch.full((2, 300, 64), float("nan"))
    keys = store[:, 20:220]
    keys.copy_(torch.randn(2, 200, 64))
    queries = torch.randn(2, 3, 200, 64)
    index = make_index("attention_aware_graph", ef_search=200, index_dtype="auto")
    index.build(keys, queries, torch.arange(200))
    assert index.keys.data_ptr() == keys.data_ptr()
    exact = (queries[:, :, -1] @ keys.transpose(1, 2)).topk(10).indices
    assert torch.equal(index.search(queries[:, :, -1], 10).ids.long(), exact)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_index("annoy"), r"strategy: got 'annoy', allowed: attention_aware_graph, flat"),
        (lambda: make_index("attention_aware_graph", key_degree=0), r"key_degree: got 0, allowed: >= 2"),
        (lambda: make_index("attention_aware_graph", q_knn=1), r"q_knn: got 1, allowed: >= 2"),
        (lambda: FlatIndex().build(torch.zeros(1, 0, 64), torch.zeros(1, 1, 1, 64)), r"keys: got shape \(1, 0, 64\)"),
        (lambda: FlatIndex().build(torch.zeros(1, 4, 64), torch.zeros(2, 1, 1, 64)), r"queries: got shape"),
        (
            lambda: FlatIndex().build(torch.zeros(1, 4, 64), torch.zeros(1, 1, 2, 64), torch.tensor([3, 1])),
            r"positions: got a decreasing sequence",
        ),
        (
            lambda: build(8)[0].search(torch.zeros(2, 3, 63), 4),
            r"queries: got shape \(2, 3, 63\), allowed: \[2, g, 64\]",
        ),
        (lambda: build(8)[0].search(torch.zeros(2, 3, 64), 0), r"k: got 0, allowed: >= 1"),
    ],
)
def test_bad_input_is_answered_with_what_is_allowed(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
