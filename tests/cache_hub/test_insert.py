"""Keys that come later: in every index, against one built over all of them and against the exact scan."""

from pathlib import Path
from typing import Any

import pytest
import torch
from graph_checks import check_structure

from cache_hub.index import INDEXES, AttentionAwareGraphIndex, FlatIndex, TokenIndex, make_index
from cache_hub.index.key_store import as_key_store
from cache_hub.index.links import PackedLinks

EXACT: dict[str, dict[str, Any]] = {
    "flat": {},
    "attention_aware_graph": {"ef_search": 4000, "index_dtype": "auto"},
    "ivf": {"n_probe": 4000, "n_list": 0},
    "hnsw": {"m": 300, "ef_construction": 1000, "ef_search": 1000},
}


def states(n: int, group: int = 3, dim: int = 64, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [R, n, D] and queries [R, g, n, D] that lie away from them, as attention's do."""
    torch.manual_seed(n + dim)
    keys = torch.randn(rows, n, dim) + torch.randn(rows, 1, dim)
    return keys, 0.5 * torch.randn(rows, group, n, dim) + torch.randn(rows, 1, 1, dim)


def grown(
    index: TokenIndex, keys: torch.Tensor, queries: torch.Tensor | None, before: int, batches: list[int]
) -> TokenIndex:
    """Built over the first `before` keys, and grown by batches; queries are those of the same positions."""
    asked = keys.new_zeros(len(keys), 1, 0, keys.shape[2]) if queries is None else queries[:, :, :before]
    index.build(keys[:, :before], asked, torch.arange(asked.shape[2]))
    for batch in batches:
        new = torch.arange(before, before + batch)
        before += batch
        index.insert(keys[:, :before], *(() if queries is None else (queries[:, :, new], new)))
    return index


CASES = [(1, [1]), (1, [63]), (2, [1, 1, 1]), (100, [63, 127]), (257, [1, 97])]


@pytest.mark.parametrize(("before", "batches"), CASES)
@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("strategy", INDEXES)
def test_everything_is_found_under_ids_that_go_on(
    strategy: str, with_queries: bool, before: int, batches: list[int]
) -> None:
    n = before + sum(batches)
    keys, queries = states(n)
    index = grown(make_index(strategy, **EXACT[strategy]), keys, queries if with_queries else None, before, batches)
    found = index.search(queries[:, :, -1], n)
    exact = FlatIndex()
    exact.build(keys, queries)
    expected = exact.search(queries[:, :, -1], n)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.ids.sort().values, expected.ids.sort().values)


@pytest.mark.parametrize("key_links", [0, 3, 8])
@pytest.mark.parametrize("projection", ["co_occurrence", "roargraph"])
@pytest.mark.parametrize(("before", "batches"), CASES)
@pytest.mark.parametrize("with_queries", [True, False])
def test_structure(before: int, batches: list[int], projection: str, key_links: int, with_queries: bool) -> None:
    keys, queries = states(before + sum(batches))
    index = AttentionAwareGraphIndex(
        key_degree=8, key_links=key_links, q_knn=6, num_entries=4, projection=projection, index_dtype="auto"
    )
    grown(index, keys, queries if with_queries else None, before, batches)
    check_structure(index, before + sum(batches), degree=8)


@pytest.mark.parametrize("kind", ["equal", "duplicates", "zero", "one huge"])
def test_structure_over_keys_that_no_score_tells_apart(kind: str) -> None:
    keys, queries = states(301)
    if kind == "equal":
        keys[:] = keys[:, :1]
    elif kind == "duplicates":
        keys[:, 150:300] = keys[:, :150]
    elif kind == "zero":
        keys[:, ::2] = 0
    else:
        keys[:, 250] *= 1000
    index = AttentionAwareGraphIndex(key_degree=6, key_links=3, q_knn=5, num_entries=4)
    check_structure(grown(index, keys, queries, 150, [64, 87]), 301, degree=6)


@pytest.mark.parametrize("other_threads", [2, 5])
def test_same_graph_for_any_thread_count(other_threads: int) -> None:
    keys, queries = states(700)
    indexes = [
        grown(AttentionAwareGraphIndex(num_threads=threads), keys, queries, 400, [200, 100])
        for threads in (1, other_threads)
    ]
    assert torch.equal(indexes[0].adjacency, indexes[1].adjacency)
    assert torch.equal(indexes[0].entries, indexes[1].entries)


def test_a_grown_graph_finds_as_much_as_one_built_at_once() -> None:
    keys, queries = states(3000, rows=4)
    exact = (queries[:, :, -50:].transpose(1, 2) @ keys[:, None, :2900].transpose(2, 3)).topk(10).indices
    recalls = []
    for batches in ([], [200, 137, 63, 500]):
        index = make_index("attention_aware_graph", key_degree=16, key_links=8, ef_search=60)
        grown(index, keys[:, :2900], queries[:, :, :2900], 2900 - sum(batches), batches)
        found = torch.stack([index.search(queries[:, :, -50 + step], 10).ids for step in range(50)], 1)
        recalls.append((exact[..., None] == found[..., None, :]).any(-1).float().mean().item())
    assert recalls[1] > recalls[0] - 0.01


def test_new_keys_get_and_give_links_to_old_ones() -> None:
    """Every old key has a near duplicate among the new ones."""
    keys, _ = states(200, rows=1)
    keys[:, 100:] = keys[:, :100] + 0.01 * torch.randn(1, 100, 64)
    links = grown(make_index("attention_aware_graph", key_degree=8, key_links=4), keys, None, 100, [100]).adjacency[0]
    twin = (torch.arange(200) + 100) % 200
    assert bool((links == twin[:, None]).any(1).all())


@pytest.mark.parametrize("new", [100, 1])
def test_the_entries_follow_the_last_queries(new: int) -> None:
    """By searches that find everything; where the new queries name too few keys, the earlier entries follow."""
    keys, queries = states(900, group=3, rows=1)
    before = 900 - new
    index = make_index("attention_aware_graph", num_entries=8, ef_search=900, index_dtype="auto")
    index.build(keys[:, :before], queries[:, :, :before], torch.arange(before))
    earlier = index.entries[0].tolist()
    index.insert(keys, queries[:, :, before:], torch.arange(before, 900))
    seen = torch.arange(900)[None, :] <= torch.arange(before, 900)[:, None]
    first = (queries[0, :, before:] @ keys[0].T).masked_fill(~seen, float("-inf")).argmax(-1)
    latest = list(dict.fromkeys(first.T.flatten().flip(0).tolist()))
    assert (len(latest) < 8) == (new == 1)
    assert index.entries[0].tolist() == list(dict.fromkeys(latest + earlier))[:8]


@pytest.mark.parametrize("index_dtype", ["auto", "bfloat16", "int8"])
def test_a_longer_view_of_one_store_and_a_copy_of_it(index_dtype: str) -> None:
    store = torch.full((2, 400, 64), float("nan"))
    store[:, 20:320], queries = states(300)
    index = make_index("attention_aware_graph", ef_search=300, num_entries=64, index_dtype=index_dtype)
    index.build(store[:, 20:220], queries[:, :, :200], torch.arange(200))
    index.insert(store[:, 20:320], queries[:, :, 200:], torch.arange(200, 300))
    assert (index.keys.data_ptr() == store[:, 20:].data_ptr()) == (index_dtype != "bfloat16")
    dtype = torch.bfloat16 if index_dtype == "bfloat16" else torch.float32
    exact = (queries[:, :, -1] @ store[:, 20:320].to(dtype).float().transpose(1, 2)).topk(10).indices
    assert torch.equal(index.search(queries[:, :, -1], 10).ids.long(), exact)
    # Links, entries, mean and root of the metric, a length for each key.
    beside = 2 * 300 * 32 * 2 + 2 * 64 * 4 + 2 * (64 + 64 * 64) * 4 + 2 * 300 * 4
    copies = {"auto": 0, "bfloat16": 2 * 300 * 64 * 2, "int8": 2 * 300 * (64 + 4) + 2 * 64 * 4}
    assert index.nbytes == beside + copies[index_dtype]


def test_query_links_are_those_of_the_new_lists_then_those_before() -> None:
    """By searches that find everything: links of a key that the new lists do not name stay; another old one has as many
    by co-occurrence as in a build of the new lists, one new pivot or none, then those before, its pivots first."""
    torch.manual_seed(0)
    keys = torch.randn(2, 90, 64)
    queries = torch.randn(2, 3, 100, 64)
    options = {"key_degree": 11, "key_links": 5, "q_knn": 6, "ef_search": 90, "index_dtype": "auto", "num_entries": 90}
    index = AttentionAwareGraphIndex(**options)
    index.build(keys[:, :80], queries[:, :, :80])
    old = index.adjacency
    index.insert(keys, queries[:, :, 80:])
    latest = AttentionAwareGraphIndex(**{**options, "key_links": 0, "key_degree": 6, "projection": "co_occurrence"})
    latest.build(keys, queries[:, :, 80:])
    assert latest.repaired_keys == index.repaired_keys == 0
    firsts = (queries[:, :, 80:] @ keys[:, None].transpose(2, 3)).topk(2).indices.flatten(1)
    added = 0
    for row in range(2):
        for key, links in enumerate(index.adjacency[row].tolist()):
            by_lists = [link for link in latest.adjacency[row, key].tolist() if link >= 0]
            before = old[row, key, :6].tolist() if key < 80 else []
            near = by_lists[:3]
            assert links[: len(near)] == near
            rest = links[len(near) : 6]
            if key < 80:
                earlier = [link for link in before[3:] + before[:3] if link not in near]
                if rest and near and rest[0] not in earlier[:1]:
                    assert rest[0] in firsts[row]
                    added += 1
                    earlier = [link for link in earlier if link != rest[0]]
                    rest = rest[1:]
                assert rest == (earlier if near else before)[: len(rest)]
    assert added > 10


def test_key_links_are_the_nearest_in_the_metric() -> None:
    """But for what the search does not find."""
    keys, queries = states(400, rows=1)
    options = {"key_degree": 16, "key_links": 16, "ef_search": 400, "index_dtype": "auto"}
    index = AttentionAwareGraphIndex(**options)
    index.build(keys[:, :300], queries[:, :, :300])
    before = index.adjacency[0]
    index.insert(keys, queries[:, :, 300:])
    metric = index._metric
    assert metric is not None
    assert metric.root is not None
    seen = torch.nn.functional.normalize((keys - metric.mean[:, None]) @ metric.root, dim=2)[0]
    cosines = (seen @ seen.T).fill_diagonal_(-2)
    links = index.adjacency[0]
    of_new = (links[300:, :, None] == cosines[300:].topk(16).indices[:, None, :]).any(1)
    assert float(of_new.float().mean()) > 0.99
    # An old key chooses among the links that it had and the new keys to whose nearest it belongs.
    known = torch.zeros(300, 400, dtype=torch.bool).scatter_(1, before.long(), True)
    known[:, 300:] |= torch.zeros(100, 400, dtype=torch.bool).scatter_(1, links[300:].long(), True)[:, :300].T
    of_old = (links[:300, :, None] == cosines[:300].masked_fill(~known, -3).topk(16).indices[:, None, :]).any(1)
    assert float(of_old.float().mean()) > 0.99


@pytest.mark.parametrize(
    "options", [{}, {"projection": "roargraph"}, {"key_metric": "cosine"}, {"index_dtype": "int8"}]
)
@pytest.mark.parametrize("lifted", [False, True])
def test_a_loaded_graph_grows_as_the_one_that_was_saved(tmp_path: Path, options: dict[str, Any], lifted: bool) -> None:
    keys, queries = states(300)
    extra = torch.rand(2, 300) if lifted else None

    def part(n: int) -> torch.Tensor | None:
        return None if extra is None else extra[:, :n].contiguous()

    index = AttentionAwareGraphIndex(**options)
    index.build(keys[:, :200], queries[:, :, :200], torch.arange(200), part(200))
    for n in (263, 300):
        before = index.keys.shape[1]
        index.save(tmp_path / f"{n}")
        loaded = AttentionAwareGraphIndex.load(tmp_path / f"{n}", keys[:, :before], part(before), insert_batch=0)
        for one in (index, loaded):
            one.insert(keys[:, :n], queries[:, :, before:n], torch.arange(before, n), part(n))
        assert torch.equal(index.adjacency, loaded.adjacency)
        assert torch.equal(index.entries, loaded.entries)
        results = [one.search(queries[:, :, 7], 20) for one in (index, loaded)]
        assert torch.equal(results[0].ids, results[1].ids)
        assert torch.equal(results[0].scores, results[1].scores)


@pytest.mark.parametrize("strategy", ["flat", "ivf", "hnsw"])
def test_a_grown_index_is_saved_whole(strategy: str, tmp_path: Path) -> None:
    keys, queries = states(300)
    index = grown(make_index(strategy), keys, queries, 200, [63, 37])
    index.save(tmp_path / "index")
    loaded = INDEXES[strategy].load(tmp_path / "index", keys)
    assert torch.equal(loaded.search(queries[:, :, 7], 20).ids, index.search(queries[:, :, 7], 20).ids)


@pytest.mark.parametrize("strategy", INDEXES)
def test_one_more_dimension_grows_too(strategy: str) -> None:
    keys, queries = states(120)
    extra = 20 * torch.randn(2, 120)
    index = make_index(strategy, **EXACT[strategy])
    index.build(keys[:, :80], queries[:, :, :80], torch.arange(80), extra[:, :80].contiguous())
    index.insert(keys, queries[:, :, 80:], torch.arange(80, 120), extra)
    expected = (queries[:, :, 5] @ keys.transpose(1, 2) + extra[:, None]).topk(9).indices
    assert torch.equal(index.search(queries[:, :, 5], 9).ids.long(), expected)


def test_links_change_their_layout_where_ids_outgrow_16_bits() -> None:
    """The rows of the last layout were full: each gives up a link, and what only that one reached is linked again."""
    torch.manual_seed(0)
    n, before = 66_000, 65_500
    keys, queries = torch.randn(1, n, 8), torch.randn(1, 2, 300, 8)
    index = AttentionAwareGraphIndex(index_dtype="auto", key_degree=8, key_links=0, q_knn=8, num_entries=8)
    index.build(keys[:, :before], queries[:, :, :200], None)
    assert index.links.segments == 1
    index.insert(keys, queries[:, :, 200:])
    assert index.links.segments == 2
    assert PackedLinks.capacity(n, 8) == 7
    check_structure(index, n, degree=8)
    assert int(index.adjacency.max()) >= 65_536


@pytest.mark.parametrize(("degree", "segments"), [(8, 2), (3, 0)])
def test_key_links_in_layouts_that_lose_their_order(degree: int, segments: int) -> None:
    """Old keys link to those at fixed distances: making their graph would take too long."""
    before, n = 70_000, 70_063
    keys, queries = states(n, dim=8, rows=1)
    index = AttentionAwareGraphIndex(key_degree=degree, key_links=degree // 2, num_entries=4, index_dtype="auto")
    index.build(keys[:, :9], queries[:, :, :9])
    distances = torch.tensor([1, 7, 50, 300, 2000, 9000, 40_000])[: PackedLinks.capacity(before, degree)]
    links = ((torch.arange(before)[:, None] + distances) % before)[None].int()
    index.keys, index.links = keys[:, :before], PackedLinks.pack(links.contiguous(), degree)
    index._store = as_key_store(index.keys)
    index.insert(keys, queries[:, :, before:], torch.arange(before, n))
    assert index.links.segments == segments
    check_structure(index, n, degree)
    found = index.adjacency[0]
    assert bool((found[before:] >= 0).any(1).all()), "new keys have links"
    assert bool((found[:before] >= before).any()), "and old ones to them"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 50, 64),), r"keys: got shape \(2, 50, 64\), allowed: \[2, N, 64\] of all keys, N more than"),
        ((torch.zeros(2, 60, 32),), r"keys: got shape \(2, 60, 32\)"),
        ((torch.zeros(2, 60, 64), torch.zeros(2, 3, 4, 32)), r"queries: got shape \(2, 3, 4, 32\)"),
        ((torch.zeros(2, 60, 64), None, torch.arange(4)), r"positions: got some without queries"),
        ((torch.zeros(2, 60, 64), torch.zeros(2, 3, 4, 64), torch.arange(3)), r"positions: got shape \(3,\)"),
        (
            (torch.zeros(2, 60, 64), torch.zeros(2, 3, 4, 64), torch.arange(40, 44)),
            r"positions: got 40, allowed: at least 49, all indexed keys seen",
        ),
        ((torch.zeros(2, 60, 64), None, None, torch.zeros(2, 60)), r"extra: got one, allowed: one if `build` had one"),
    ],
)
@pytest.mark.parametrize("strategy", INDEXES)
def test_bad_input_changes_nothing(strategy: str, arguments: tuple[Any, ...], message: str) -> None:
    keys, queries = states(50)
    index = make_index(strategy)
    index.build(keys, queries)
    before = index.search(queries[:, :, 0], 5)
    with pytest.raises(ValueError, match=message):
        index.insert(*arguments)
    assert torch.equal(index.search(queries[:, :, 0], 5).ids, before.ids)
