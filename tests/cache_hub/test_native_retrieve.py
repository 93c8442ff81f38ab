"""One native call for a step's retrieval against its parts: search by the index, `unite`, and a look-up of clusters."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_hub.index import AttentionAwareGraphIndex, _native
from cache_hub.index.base import asked_vectors
from cache_hub.index.key_store import as_key_store
from cache_hub.index.links import PackedLinks


@dataclass
class Sequences:
    """Some that were prefilled together: rows [R] in the index, whose first key stands at position `first`."""

    index: AttentionAwareGraphIndex
    queries: Tensor
    first: int
    assignment: Tensor

    def view(self, clusters: bool) -> _native.GraphView:
        index, compact = self.index, self.index._compact
        return _native.GraphView(
            keys=index._store if compact is None else compact.view(index.extra),
            links=index.links.data.data_ptr(),
            slots=index.links.slots,
            segments=index.links.segments,
            entries=index.entries.data_ptr(),
            num_entries=index.options.num_entries,
            exact=None if compact is None else index._store,
            first=self.first,
            assignment=self.assignment.data_ptr() if clusters else 0,
            tokens=self.assignment.shape[1],
        )


def interleaved(rows: int, n: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Keys [R, N, D] as a store [R, N, 2, D] of keys and values has them; a value that was read would spoil a score."""
    store = torch.full((rows, n, 2, dim), float("nan"), dtype=dtype)
    store[:, :, 0] = torch.randn(rows, n, dim) + torch.randn(rows, 1, dim)
    return store[:, :, 0]


def sequences(n: int, group: int, dim: int, rows: int, lifted: bool = False, **options: Any) -> Sequences:
    torch.manual_seed(n + dim + group)
    keys = interleaved(rows, n, dim, torch.bfloat16)
    queries = torch.randn(rows, group, n, dim) + torch.randn(rows, 1, 1, dim)
    index = AttentionAwareGraphIndex(1, **{"key_degree": 8, "key_links": 4, "q_knn": 6, "num_entries": 4, **options})
    index.build(keys, queries, torch.arange(n), torch.rand(rows, n) if lifted else None)
    assignment = torch.randint(0, 40, (rows, n + 3), dtype=torch.int32)
    return Sequences(index, torch.randn(rows, group, dim), 11 * n, assignment)


def retrieve(
    parts: list[Sequences],
    near: Tensor | None,
    k: int,
    threads: int = 1,
    num_near: int | None = None,
    clusters: bool = True,
    foreseen: Tensor | None = None,
    foreseen_ef: int = 0,
    posted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """ids, keys scored, positions, clusters and the two sums; outputs come filled with what none of them holds."""
    options = parts[0].index.options
    asked = torch.cat([asked_vectors(part.queries, part.index.extra is not None) for part in parts])
    if posted is not None:
        expected, asked = asked, torch.zeros_like(asked)
    rows, group, _ = asked.shape
    width = 0 if near is None else near.shape[2]
    ids = torch.full((rows, group, k), -7, dtype=torch.int32)
    scored = torch.full((rows, group), -7)
    positions, found_in = torch.full((2, rows, group * k), -7, dtype=torch.int32).unbind()
    sums = _native.Retrieving(
        [part.view(clusters) for part in parts],
        asked.data_ptr(),
        group,
        0 if near is None else near.data_ptr(),
        width,
        width if num_near is None else num_near,
        k,
        options.ef_search,
        threads,
        ids.data_ptr(),
        scored.data_ptr(),
        positions.data_ptr(),
        found_in.data_ptr() if clusters else 0,
        0 if posted is None else posted.data_ptr(),
        0 if foreseen is None else foreseen.data_ptr(),
        foreseen_ef,
    ).finish()
    if posted is not None and sums[1] >= 0:
        assert torch.equal(asked, expected), "the queries that came are kept"
    return ids, scored, positions, found_in, *sums[:2]


def in_parts(
    parts: list[Sequences], near: Tensor | None, k: int, num_near: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """As retrieve."""
    every: list[tuple[Tensor, ...]] = []
    row = total = 0
    for part in parts:
        count = len(part.queries)
        start = None if near is None else near[row : row + count, :, :num_near]
        found = part.index.search(part.queries, k, start)
        positions = torch.empty(count, found.ids[0].numel(), dtype=torch.int32)
        total += sum(_native.unite(found.ids.data_ptr(), count, positions.shape[1], part.first, positions.data_ptr()))
        there = part.assignment.gather(1, (positions - part.first).clamp(min=0).long())
        every.append((found.ids, found.keys_scored, positions, there.masked_fill(positions < 0, -1)))
        row += count
    ids, scored, positions, clusters = (torch.cat(tensors) for tensors in zip(*every, strict=True))
    return ids, scored, positions, clusters, int(scored.sum()), total


def check_equal(got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def near_keys(parts: list[Sequences], group: int, width: int) -> Tensor:
    """Random ones, -1 pads behind the first i % (width + 1) of the i-th query head."""
    near = torch.stack(
        [
            torch.randint(0, part.index.keys.shape[1], (group, width), dtype=torch.int32)
            for part in parts
            for _ in range(len(part.queries))
        ]
    )
    filled = torch.arange(near[..., 0].numel()).view(len(near), group, 1) % (width + 1)
    return near.masked_fill(torch.arange(width) >= filled, -1)


@pytest.mark.parametrize("kind", ["plain", "int8", "lifted", "lifted int8"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_retrieval_is_search_union_and_look_up(group: int, dim: int, kind: str) -> None:
    """Sequences of 1, 63 and 500 tokens, in several threads, more than once; of the short ones all keys are found, and
    pads follow."""
    options = {"lifted": "lifted" in kind, "index_dtype": "int8" if "int8" in kind else "auto", "ef_search": 12}
    parts = [sequences(n, group, dim, rows, **options) for n, rows in ((500, 2), (1, 2), (63, 1), (257, 3))]
    for near in (None, near_keys(parts, group, 30)):
        expected = in_parts(parts, near, 9)
        for threads in (1, 2, 5, 5):
            check_equal(retrieve(parts, near, 9, threads), expected)
    assert bool((expected[0] < 0).any())
    assert bool((expected[3] == -1).eq(expected[2] == -1).all())


def test_only_the_first_near_keys_are_starts() -> None:
    parts = [sequences(200, 3, 64, 2, ef_search=4), sequences(90, 3, 64, 1, ef_search=4)]
    near = near_keys(parts, 3, 30)
    expected = in_parts(parts, near, 5, num_near=7)
    near[..., 7:] = 1 << 30  # a key that is nowhere
    check_equal(retrieve(parts, near, 5, num_near=7), expected)
    check_equal(retrieve(parts, near, 5, num_near=0), in_parts(parts, None, 5))


def test_clusters_are_left_alone_where_they_are_not_wanted() -> None:
    parts = [sequences(63, 3, 64, 2)]
    with_them, without = retrieve(parts, None, 5), retrieve(parts, None, 5, clusters=False)
    check_equal(without[:3] + without[4:], with_them[:3] + with_them[4:])
    assert bool((without[3] == -7).all())


@pytest.mark.parametrize(("degree", "layouts"), [(6, [1, 2, 2]), (3, [1, 0, 0])])
def test_graphs_with_links_in_different_layouts(degree: int, layouts: list[int]) -> None:
    """65,535 keys and more; random links: their making would take too long."""
    parts = []
    for n in (65_535, 65_536, 70_000):
        part = sequences(9, 3, 64, 1, key_degree=degree, key_links=3, ef_search=30)
        index, keys = part.index, interleaved(1, n, 64, torch.bfloat16)
        links = torch.randint(0, n, (1, n, PackedLinks.capacity(n, degree)), dtype=torch.int32)
        index.keys, index.links, index._store = keys, PackedLinks.pack(links, degree), as_key_store(keys)
        part.assignment = torch.randint(0, 4000, (1, n), dtype=torch.int32)
        parts.append(part)
    assert [part.index.links.segments for part in parts] == layouts
    near = near_keys(parts, 3, 20)
    expected = in_parts(parts, near, 40)
    assert int(expected[0].max()) >= 65_536
    for threads in (1, 3):
        check_equal(retrieve(parts, near, 40, threads), expected)


def test_no_sequences() -> None:
    assert _native.Retrieving([], 0, 4, 0, 0, 0, 5, 5, 1, 0, 0, 0, 0, 0, 0, 0).finish() == (0, 0, 0)


def test_what_does_not_fit_is_refused() -> None:
    part = sequences(63, 3, 64, 1)
    near = near_keys([part], 3, 6)
    with pytest.raises(ValueError, match="num_near: got 7, allowed: 0 to 6"):
        retrieve([part], near, 5, num_near=7)
    with pytest.raises(ValueError, match="num_near: got 3, allowed: 0 to 0"):
        retrieve([part], None, 5, num_near=3)
    with pytest.raises(ValueError, match="num_threads: got 0, allowed: 1 or more"):
        retrieve([part], None, 5, threads=0)
    with pytest.raises(ValueError, match="foreseen_ef: got -1, allowed: >= 0"):
        retrieve([part], None, 5, foreseen_ef=-1)
    rest = (0, 3, 0, 0, 0, 5, 5, 1, 0, 0, 0)
    with pytest.raises(ValueError, match="keys: got 128, allowed: 64 wide"):
        _native.Retrieving([part.view(True), sequences(63, 3, 128, 1).view(True)], *rest, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="assignment: got 0, allowed: one for every view"):
        _native.Retrieving([part.view(False)], *rest, 1, 0, 0, 0)
    part.assignment = part.assignment[:, :62]
    with pytest.raises(ValueError, match="tokens: got 62, allowed: 63 or more"):
        part.view(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", ["auto", "int8"])
def test_keys_beside_their_values_are_as_keys_alone(index_dtype: str, dtype: torch.dtype) -> None:
    """Built, grown and searched where rows stand 2 D apart, with lists by every product that reads the keys."""
    torch.manual_seed(0)
    apart, n, before = interleaved(2, 300, 64, dtype), 300, 200
    queries, found = torch.randn(2, 3, n, 64), []
    for keys in (apart, apart.contiguous()):
        index = AttentionAwareGraphIndex(key_degree=8, key_links=4, q_knn=6, index_dtype=index_dtype, ef_search=20)
        index.build(keys[:, :before], queries[:, :, :before], torch.arange(before))
        index.insert(keys, queries[:, :, before:], torch.arange(before, n))
        found.append((index.adjacency, index.entries, index.search(queries[:, :, -1], 10).ids))
    check_equal(*found)
