"""Retrieval that begins with what the queries will be about: against a plain two-part walk, and while they arrive."""

import threading
import time
from typing import Any

import pytest
import torch
from test_native_retrieve import Sequences, check_equal, in_parts, near_keys, retrieve, sequences
from torch import Tensor

FOLLOWED = 20  # hits of a query head's own whose next keys are starts too


def walk(met: set[int], expanded: set[int], scores: Tensor, links: list[list[int]], ef: int) -> None:
    """Expands the best of the `ef` best keys met until all of them are."""
    while True:
        beam = sorted(met, key=lambda key: -float(scores[key]))[:ef]
        waiting = [key for key in beam if key not in expanded]
        if not waiting:
            return
        expanded.add(waiting[0])
        met.update(links[waiting[0]])


def two_walks(part: Sequences, foreseen: Tensor, near: Tensor, k: int, first_ef: int) -> tuple[Tensor, Tensor]:
    """ids [R, g, k] and keys scored [R, g] by the definition, in float64."""
    index, (rows, group, _) = part.index, part.queries.shape
    ids, scored = torch.full((rows, group, k), -1, dtype=torch.int32), torch.zeros(rows, group, dtype=torch.int64)
    for r in range(rows):
        keys = index.keys[r].double()
        links = [[key for key in keys_of if key >= 0] for keys_of in index.adjacency[r].tolist()]
        for head in range(group):
            met = {key for key in near[r].flatten().tolist() + index.entries[r].tolist() if key >= 0}
            own = [key for key in near[r, head].tolist()[:FOLLOWED] if key >= 0]
            met |= {key + 1 for key in own if key + 1 < len(keys)}
            expanded: set[int] = set()
            walk(met, expanded, keys @ foreseen[r, head].double(), links, max(first_ef, 1))
            before, scores = len(met), keys @ part.queries[r, head].double()
            walk(met, expanded, scores, links, max(index.options.ef_search, k))
            best = sorted(met, key=lambda key: -float(scores[key]))[:k]
            ids[r, head, : len(best)] = torch.tensor(best, dtype=torch.int32)
            scored[r, head] = before + len(met)
    return ids, scored


def some(group: int, dim: int, **options: Any) -> list[Sequences]:
    return [sequences(n, group, dim, rows, ef_search=12, **options) for n, rows in ((400, 2), (1, 1), (63, 2))]


def about(parts: list[Sequences]) -> Tensor:
    """Queries [R, g, D] near those of the parts."""
    queries = torch.cat([part.queries for part in parts])
    return queries + 0.5 * torch.randn(queries.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("first_ef", [0, 12, 40])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_a_search_for_what_is_foreseen_goes_on_for_the_query(group: int, dim: int, first_ef: int) -> None:
    parts = some(group, dim)
    near, foreseen = near_keys(parts, group, 30), about(parts)
    rows = [len(part.queries) for part in parts]
    by_part = zip(parts, foreseen.split(rows), near.split(rows), strict=True)
    expected = [torch.cat(both) for both in zip(*(two_walks(*each, 9, first_ef) for each in by_part), strict=True)]
    for threads in (1, 2, 7):
        got = retrieve(parts, near, 9, threads, foreseen=foreseen, foreseen_ef=first_ef)
        check_equal(got[:2], tuple(expected))


@pytest.mark.parametrize("index_dtype", ["auto", "int8"])
def test_the_query_itself_foreseen_finds_the_same_and_scores_it_twice(index_dtype: str) -> None:
    parts = some(3, 64, index_dtype=index_dtype)
    near, queries = near_keys(parts, 3, 30), torch.cat([part.queries for part in parts])
    expected = in_parts(parts, near, 9)
    got = retrieve(parts, near, 9, 2, foreseen=queries, foreseen_ef=12)
    for tensor in (0, 2, 3):
        assert torch.equal(got[tensor], expected[tensor])
    ranked = torch.cat([torch.full((len(p.queries), 3), min(12, p.index.keys.shape[1])) for p in parts])
    walked = expected[1] - (ranked if index_dtype == "int8" else 0)
    assert torch.equal(got[1], expected[1] + walked)


def absent(shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, -1, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("foresees", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_posted_is_waited_for(threads: int, foresees: bool) -> None:
    """Numbers come while the call runs, the last ones of each query first, and are absent again behind it."""
    parts = some(3, 64)
    near, foreseen, queries = near_keys(parts, 3, 30), about(parts), torch.cat([part.queries for part in parts])
    hint = {"foreseen": foreseen, "foreseen_ef": 15} if foresees else {}
    expected = retrieve(parts, near, 9, threads, **hint)
    posted, told = absent(queries.shape), absent(queries.shape)

    def device() -> None:
        for target, source in ((told, foreseen), (posted, queries)):
            for half in (slice(32, 64), slice(0, 32)):
                time.sleep(0.005)
                target[..., half] = source[..., half]

    other = threading.Thread(target=device)
    other.start()
    if foresees:
        hint["foreseen"] = told
    got = retrieve(parts, near, 9, threads, posted=posted, **hint)
    other.join()
    check_equal(got, expected)
    assert bool((posted.view(torch.int32) == -1).all())
    if foresees:
        assert bool((told.view(torch.int32) == -1).all())


def test_what_never_comes_is_told() -> None:
    parts = some(3, 64)
    queries = torch.cat([part.queries for part in parts])
    posted = queries.clone()
    posted[-1, -1, 5] = absent((1,))
    got = retrieve(parts, None, 9, 2, posted=posted)
    assert got[5] == -1
    assert torch.equal(posted[:-1], queries[:-1]), "what came is still there for the next call"
    posted[-1, -1, 5] = queries[-1, -1, 5]
    check_equal(retrieve(parts, None, 9, 2, posted=posted), retrieve(parts, None, 9, 2))
