"""The indexes through faiss: against the flat oracle, what they count, and any shape and thread count."""

import multiprocessing
import os
from typing import Any

import faiss
import pytest
import torch

from cache_hub import HNSWCache, IVFCache, make_cache
from cache_hub.index import HNSWIndex, IVFIndex, TokenIndex, make_index
from config import RetroInferConfig


def states(
    n: int, group: int = 3, dim: int = 64, rows: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [rows, n, dim] off the origin and decode queries [rows, group, dim] away from them, as attention's are."""
    torch.manual_seed(n + dim)
    keys = (torch.randn(rows, n, dim) + torch.randn(rows, 1, dim)).to(dtype)
    return keys, torch.randn(rows, group, dim) + torch.randn(rows, 1, dim)


def build(strategy: str, keys: torch.Tensor, **options: Any) -> Any:
    index = make_index(strategy, **options)
    index.build(keys, keys.new_zeros(len(keys), 1, 0, keys.shape[2]))
    return index


def recall(index: TokenIndex, keys: torch.Tensor, queries: torch.Tensor, k: int) -> float:
    exact = build("flat", keys).search(queries, k).ids
    found = index.search(queries, k).ids
    return (exact[..., None] == found[..., None, :]).any(-1).float().mean().item()


def complete(strategy: str, n: int) -> dict[str, int]:
    """Options under which the index finds everything among n keys: all lists, or links between all keys."""
    return {"n_probe": n} if strategy == "ivf" else {"m": max(n, 2), "ef_construction": n, "ef_search": n}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "group", "dim", "k"), [(1, 1, 64, 1), (2, 3, 64, 5), (63, 4, 128, 10), (257, 3, 80, 300)]
)
@pytest.mark.parametrize("strategy", ["ivf", "hnsw"])
def test_searching_everything_equals_the_exact_scan(
    strategy: str, n: int, group: int, dim: int, k: int, dtype: torch.dtype
) -> None:
    keys, queries = states(n, group, dim, dtype=dtype)
    found = build(strategy, keys, **complete(strategy, n)).search(queries, k)
    exact = build("flat", keys).search(queries, k)
    assert (found.ids.dtype, found.scores.dtype, found.keys_scored.dtype) == (torch.int32, torch.float32, torch.int64)
    assert found.ids.shape == found.scores.shape == (2, group, k)
    torch.testing.assert_close(found.scores, exact.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.ids.sort().values, exact.ids.sort().values), "pads included"


def test_a_wide_beam_over_few_links_finds_nearly_all() -> None:
    keys, queries = states(500)
    assert recall(build("hnsw", keys, ef_search=500), keys, queries, 50) > 0.95


@pytest.mark.parametrize(
    ("strategy", "widths"),
    [("ivf", [{"n_probe": p} for p in (1, 10, 60)]), ("hnsw", [{"ef_search": ef} for ef in (10, 80, 640)])],
)
def test_recall_and_keys_scored_grow_with_the_width_of_the_search(strategy: str, widths: list[dict[str, int]]) -> None:
    keys, queries = states(2003)
    indexes = [build(strategy, keys, **width) for width in widths]
    recalls = [recall(index, keys, queries, 10) for index in indexes]
    scored = [index.search(queries, 10).keys_scored.sum().item() for index in indexes]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1]
    assert scored == sorted(scored)


def test_beam_is_raised_to_k() -> None:
    keys, queries = states(1500)
    narrow, wide = build("hnsw", keys, ef_search=2), build("hnsw", keys, ef_search=40)
    assert torch.equal(narrow.search(queries, 40).ids, wide.search(queries, 40).ids)


def test_ivf_counts_centroids_and_the_keys_of_the_lists_searched() -> None:
    """Recomputed from the definition: nearest centroid by distance for keys, by inner product for queries."""
    keys, queries = states(700)
    index = build("ivf", keys, n_list=20, n_probe=3)
    found = index.search(queries, 700)
    for row in range(2):
        centroids = torch.from_numpy(index._rows[row].centroids.reconstruct_n(0, 20))
        lists = torch.cdist(keys[row], centroids).argmin(1)
        for head in range(3):
            probed = (centroids @ queries[row, head]).topk(3).indices
            expected = torch.isin(lists, probed).nonzero()[:, 0].tolist()
            assert sorted(found.ids[row, head][found.ids[row, head] >= 0].tolist()) == expected
            assert found.keys_scored[row, head] == 20 + len(expected)


@pytest.mark.parametrize(("n", "n_list", "n_probe"), [(1, 1, 1), (2, 2, 1), (63, 32, 2), (2500, 200, 10)])
def test_default_lists_follow_the_rule(n: int, n_list: int, n_probe: int) -> None:
    for row in build("ivf", states(n)[0])._rows:
        assert (row.index.nlist, row.index.nprobe) == (n_list, n_probe)


@pytest.mark.parametrize(("n", "m", "ef", "k"), [(1, 4, 5, 3), (2, 4, 5, 3), (1000, 8, 20, 10), (1500, 4, 10, 30)])
def test_hnsw_counts_every_key_that_a_plain_walk_over_its_links_scores(n: int, m: int, ef: int, k: int) -> None:
    keys, queries = states(n)
    index = build("hnsw", keys, m=m, ef_search=ef)
    found = index.search(queries, k)
    for row in range(2):
        for head in range(3):
            ids, scored = walk(index._rows[row], keys[row], queries[row, head], max(ef, k), k)
            assert found.ids[row, head, : len(ids)].tolist() == ids
            assert found.keys_scored[row, head] == scored


def walk(index: Any, keys: torch.Tensor, query: torch.Tensor, ef: int, k: int) -> tuple[list[int], int]:
    """HNSW's search in plain Python: ids best first, and how many inner products it took."""
    graph = index.hnsw
    places = faiss.vector_to_array(graph.neighbors).tolist()
    first = faiss.vector_to_array(graph.offsets).tolist()
    of_level = faiss.vector_to_array(graph.cum_nneighbor_per_level).tolist()
    products = (keys @ query).tolist()
    scored = 1

    def links(x: int, level: int) -> list[int]:
        return [y for y in places[first[x] + of_level[level] : first[x] + of_level[level + 1]] if y >= 0]

    here = graph.entry_point
    for level in range(graph.max_level, 0, -1):
        start = None
        while here != start:
            start = here
            scored += len(links(start, level))
            here = max([here, *links(start, level)], key=products.__getitem__)
    met, spent, beam = {here}, set(), [here]
    while beam_left := [x for x in beam if x not in spent]:
        here = max(beam_left, key=products.__getitem__)
        spent.add(here)
        if sum(products[x] > products[here] for x in beam) >= ef:
            break
        fresh = [y for y in links(here, 0) if y not in met]
        scored += len(fresh)
        met.update(fresh)
        beam = sorted([*beam, *fresh], key=products.__getitem__, reverse=True)[:ef]
    return sorted(met, key=products.__getitem__, reverse=True)[:k], scored


@pytest.mark.parametrize("strategy", ["ivf", "hnsw"])
def test_same_result_for_any_thread_count_and_in_every_build(strategy: str) -> None:
    keys, queries = states(1009, rows=5)
    found = [build(strategy, keys, num_threads=threads).search(queries, 30) for threads in (1, 1, 2, 5)]
    for other in found[1:]:
        assert torch.equal(found[0].ids, other.ids)
        assert torch.equal(found[0].scores, other.scores)
        assert torch.equal(found[0].keys_scored, other.keys_scored)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_searches_with_threads_of_its_own() -> None:
    keys, queries = states(300)
    index = build("ivf", keys, num_threads=2)
    expected = index.search(queries, 5).ids.tolist()

    def child() -> None:
        os._exit(0 if index.search(queries, 5).ids.tolist() == expected else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=30)
    process.kill()
    assert process.exitcode == 0


@pytest.mark.parametrize("strategy", ["ivf", "hnsw"])
@pytest.mark.parametrize("n", [1, 2, 63, 300])
def test_equal_keys_are_found_once_each(strategy: str, n: int) -> None:
    keys = torch.ones(2, n, 64)
    found = build(strategy, keys, **complete(strategy, n)).search(torch.ones(2, 3, 64), n + 2)
    assert torch.equal(found.ids.sort().values[..., 2:], torch.arange(n).expand(2, 3, n).int())
    assert bool((found.scores[..., :n] == 64).all())
    assert bool((found.scores[..., n:] == float("-inf")).all())


@pytest.mark.parametrize("strategy", ["ivf", "hnsw"])
def test_duplicates_share_the_first_places(strategy: str) -> None:
    keys, queries = states(200)
    keys = torch.cat((keys, keys), 1)
    found = build(strategy, keys, **complete(strategy, 400)).search(queries, 2)
    assert torch.equal(found.ids[..., 0] % 200, found.ids[..., 1] % 200)
    assert bool((found.ids[..., 0] != found.ids[..., 1]).all())


@pytest.mark.parametrize("strategy", ["ivf", "hnsw"])
def test_keys_may_have_gaps_between_rows_and_are_copied(strategy: str) -> None:
    store = torch.full((2, 300, 64), float("nan"))
    keys, queries = states(200)
    store[:, 20:220] = keys
    index = build(strategy, store[:, 20:220])
    before = index.search(queries, 10)
    store.fill_(0)
    assert torch.equal(index.search(queries, 10).ids, before.ids)
    assert torch.equal(build(strategy, keys).search(queries, 10).ids, before.ids)


def test_nbytes_counts_vectors_links_lists_and_centroids() -> None:
    keys, _ = states(100)
    assert build("ivf", keys, n_list=10).nbytes == 2 * (100 * 64 * 4 + 100 * 8 + 10 * 64 * 4)
    index = build("hnsw", keys, m=4)
    links = sum(row.hnsw.neighbors.size() for row in index._rows)
    assert links >= 2 * 100 * 8
    assert index.nbytes == 2 * (100 * 64 * 4 + 100 * 4 + 101 * 8) + links * 4


@pytest.mark.parametrize(("cache", "strategy"), [(IVFCache, "ivf"), (HNSWCache, "hnsw")])
def test_options_of_the_configuration_reach_the_index(cache: type, strategy: str) -> None:
    own = {"n_list": 9, "n_probe": 4} if strategy == "ivf" else {"m": 5, "ef_construction": 6, "ef_search": 7}
    settings = RetroInferConfig(retrieval_strategy=strategy, attention_aware_graph={"top_k": 11}, **{strategy: own})
    sizes = {"layer_num": 1, "batch_size": 1, "num_key_value_heads": 1, "num_heads": 1, "head_dim": 64}
    common = {**sizes, "max_length": 9, "max_new_length": 1, "dtype": torch.float32}
    made = make_cache(strategy, settings, **common)
    assert isinstance(made, cache)
    assert made.top_k == 11
    assert made.new_index().options.model_dump(exclude={"top_k"}) == own
    stated = settings.model_copy(update={strategy: getattr(settings, strategy).model_copy(update={"top_k": 3})})
    assert make_cache(strategy, stated, **common).top_k == 3
    with pytest.raises(ValueError, match="got 0, allowed: >= 1" if strategy == "hnsw" else "got 2, allowed: 0 to 1"):
        cache(**common, **({"m": 4, "ef_search": 0} if strategy == "hnsw" else {"n_list": 1, "n_probe": 2}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("ivf", states(63)[0], n_list=64), r"n_list: got 64 for 63 keys, allowed: 0 to 63"),
        (lambda: IVFIndex(n_lists=3), r"n_lists: unknown key, got 3 \(did you mean n_list\?\)"),
        (lambda: HNSWIndex(m=0), r"m: got 0, allowed: >= 2"),
        (lambda: build("ivf", torch.zeros(1, 0, 64)), r"keys: got shape \(1, 0, 64\)"),
        (lambda: build("hnsw", torch.zeros(1, 4, 64, dtype=torch.float64)), r"keys: got torch.float64 on cpu, allowed"),
        (lambda: build("hnsw", torch.zeros(1, 4, 64, device="meta")), r"keys: got torch.float32 on meta, allowed"),
        (lambda: build("hnsw", states(8)[0]).search(torch.zeros(2, 3, 63), 4), r"queries: got shape \(2, 3, 63\)"),
        (lambda: build("ivf", states(8)[0]).search(torch.zeros(3, 3, 64), 4), r"queries: got shape \(3, 3, 64\)"),
        (lambda: build("ivf", states(8)[0]).search(torch.zeros(2, 3, 64), 0), r"k: got 0, allowed: >= 1"),
    ],
)
def test_bad_input_is_answered_with_what_is_allowed(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
