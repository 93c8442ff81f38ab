"""What every graph must be, whatever it was made of."""

from collections import deque

from cache_hub.index import AttentionAwareGraphIndex, TokenIndex


def reachable(index: AttentionAwareGraphIndex, row: int) -> set[int]:
    """The keys of a row that a walk from its entries meets."""
    links = index.adjacency[row].tolist()
    met = {entry for entry in index.entries[row].tolist() if entry >= 0}
    queue = deque(met)
    while queue:
        fresh = {y for y in links[queue.popleft()] if y >= 0} - met
        met |= fresh
        queue.extend(fresh)
    return met


def check_structure(index: TokenIndex, n: int, degree: int) -> None:
    """At most `degree` links of each of n keys, to other keys, none twice, pads last, and every key reachable."""
    assert isinstance(index, AttentionAwareGraphIndex)
    rows = len(index.entries)
    assert index.adjacency.shape == (rows, n, degree)
    for row in range(rows):
        for x, links in enumerate(index.adjacency[row].tolist()):
            named = [y for y in links if y >= 0]
            assert links == named + [-1] * (degree - len(named)), "pads come last"
            assert len(set(named)) == len(named), "no link twice"
            assert x not in named, "no link to itself"
            assert all(y < n for y in named)
        entries = index.entries[row].tolist()
        named = [entry for entry in entries if entry >= 0]
        assert entries == named + [-1] * (len(entries) - len(named)), "pads come last"
        assert len(set(named)) == len(named)
        assert reachable(index, row) == set(range(n))
