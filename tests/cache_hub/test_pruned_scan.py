"""The scan of chosen clusters on the device, against plain torch: ragged clusters, lengths, groups and shares."""

import pytest
import torch
from prune_oracle import best_scanned, ranks_of, scanned_by
from scan_oracle import union_of

from cache_hub.index.clustered_keys import ALL, ClusteredKeys
from cache_hub.index.device_keys import DeviceKeys

pytest.importorskip("triton")
from cache_hub.index import pruned_scan
from cache_hub.index.device_scan import DeviceScan, ScanTuning, Union
from cache_hub.index.pruned_scan import PrunedScan

SMALL = ScanTuning(keys=64, stages=1, run=16)
KV_HEADS = 2


class Table:
    """Keys of several sequences in random clusters: `tokens` of each, a third of which came later, in later ones."""

    def __init__(self, tokens: list[int], kind: str, dim: int, device: str) -> None:
        generator = torch.Generator().manual_seed(sum(tokens) + dim)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        batch, room = len(tokens), max(tokens) + 3
        most = max(room // 10 + 2, 3)
        self.keys = ClusteredKeys(batch, KV_HEADS, room, dim, most, torch.device(device))
        self.states = torch.zeros(batch, KV_HEADS, self.keys.codes.shape[2], dim)
        self.assignment = torch.zeros(batch, KV_HEADS, self.keys.codes.shape[2], dtype=torch.int32)
        for b, count in enumerate(tokens):
            done, clusters, here = 0, 0, slice(b, b + 1)
            for add in (count - count // 3, count // 3):
                if not add:
                    continue
                states = draw(1, KV_HEADS, add, dim) + draw(dim)
                (self.keys.grow if done else self.keys.put)(here, states.to(device))
                more = max((add * most) // (2 * max(tokens)), 1)
                places = {
                    "even": torch.arange(add) % more,
                    "one": torch.zeros(add, dtype=torch.int64),  # all others are empty
                    "ragged": (torch.rand(1, KV_HEADS, add, generator=generator) ** 3 * more).long(),
                }[kind]
                own = (clusters + places).expand(1, KV_HEADS, add).int()
                clusters += more
                self.keys.arrange(here, own.to(device), clusters)
                self.states[here, :, done : done + add], self.assignment[here, :, done : done + add] = states, own
                done += add
        places = self.assignment.long()[..., None].expand(-1, -1, -1, dim)
        there = (torch.arange(places.shape[2]) < torch.tensor(tokens)[:, None]).float()[:, None]
        there = there.expand(-1, KV_HEADS, -1).contiguous()
        self.sizes = torch.zeros(batch, KV_HEADS, most).scatter_add_(2, self.assignment.long(), there)
        sums = torch.zeros(batch, KV_HEADS, most, dim).scatter_add_(2, places, self.states * there[..., None])
        self.centroids = (sums / self.sizes.clamp(min=1)[..., None]).to(device)
        self.assignment, self.sizes = self.assignment.to(device), self.sizes.to(device)

    def asked(self, group: int) -> torch.Tensor:
        batch, _, _, dim = self.states.shape
        generator = torch.Generator().manual_seed(dim)
        query = torch.randn(batch, 1, KV_HEADS * group, dim, generator=generator).to(self.centroids)
        return query[:, :, :1] + 0.5 * query  # heads that ask nearly the same find much the same


def chosen_by(scan: PrunedScan, ranks: torch.Tensor) -> torch.Tensor:
    """Which clusters of ranks [B, Hkv, g, C] reach the bounds."""
    numbers = ranks.view(torch.int32)
    numbers = torch.where(numbers >= 0, numbers, numbers ^ 0x7FFFFFFF)
    return (numbers >= scan.bounds.view(*ranks.shape[:3], 1)) & (ranks > float("-inf"))


CASES = [
    ([1], 1, 64, 5), ([63], 3, 64, 10), ([127], 4, 128, 100), ([1009], 4, 128, 100), ([1000], 1, 64, 17),
    ([997, 0, 63], 3, 80, 40), ([300, 2011], 7, 64, 33), ([700], 4, 64, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "group", "dim", "k", "kind", "share"),
    [(*case, "ragged", 0.1) for case in CASES]
    + [(*CASES[n], kind, share) for n, kind, share in ((1, "one", 0.5), (3, "even", 0.6), (5, "one", 0.1))],
)
def test_the_best_of_the_best_clusters(
    device: str, tokens: list[int], group: int, dim: int, k: int, kind: str, share: float
) -> None:
    table = Table(tokens, kind, dim, device)
    keys, query = table.keys, table.asked(group)
    keys.want(share, 2)
    scan = PrunedScan(keys, group, k, SMALL)
    for scratch in (scan.scores, scan._maxima):
        scratch.fill_(float("nan"))  # what no program writes must not be read
    scan.places.fill_(1 << 30)
    scanned = scan.counters(keys)
    for _ in range(2):
        scan.search_clusters(query, keys, table.centroids, scanned)
    ranks = scan.ranks.view(len(tokens), KV_HEADS, group, -1)
    expected = ranks_of(query, table.centroids, table.sizes)
    torch.testing.assert_close(ranks, expected.float(), rtol=1e-5, atol=1e-3)
    chosen = chosen_by(scan, ranks)
    wanted = torch.minimum(keys.wanted, (table.sizes > 0).sum(2))[:, :, None]
    assert (chosen.sum(3) >= wanted).all()
    assert (chosen.sum(3) <= wanted + wanted // 8).all()
    members = scanned_by(chosen, table.assignment, tokens)
    found, counts = scan.found(keys)
    assert torch.equal(counts, members.sum(2))
    assert torch.equal(scanned.sum(2), 2 * counts)
    assert torch.equal(found.sort(3).values, best_scanned(query, keys, members, k).sort(3).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits(device: str, dtype: torch.dtype) -> None:
    table = Table([700], "even", 128, device)
    query, centroids = table.asked(4).to(dtype), table.centroids.to(dtype)
    table.keys.want(0.2, 1)
    scan = PrunedScan(table.keys, 4, 20, SMALL)
    scan.search_clusters(query, table.keys, centroids, scan.counters(table.keys))
    ranks = scan.ranks.view(1, KV_HEADS, 4, -1)
    torch.testing.assert_close(ranks, ranks_of(query, centroids, table.sizes).float(), rtol=1e-4, atol=1e-3)
    members = scanned_by(chosen_by(scan, ranks), table.assignment, [700])
    found, _ = scan.found(table.keys)
    assert torch.equal(found.sort(3).values, best_scanned(query, table.keys, members, 20).sort(3).values)


@pytest.mark.parametrize(("tokens", "group", "dim", "k"), CASES)
def test_all_clusters_are_all_keys(device: str, tokens: list[int], group: int, dim: int, k: int) -> None:
    table = Table(tokens, "ragged", dim, device)
    keys, query = table.keys, table.asked(group)
    keys.want(1.0, 1)
    assert keys.wanted.eq(ALL).all()
    plain = DeviceKeys(len(tokens), KV_HEADS, max(tokens) + 3, dim, torch.device(device))
    order = keys.tokens.long()
    for b, head in torch.cartesian_prod(torch.arange(len(tokens)), torch.arange(KV_HEADS)).tolist():
        own = order[b, head, : tokens[b]]
        assert torch.equal(own.sort().values, torch.arange(tokens[b], device=device))
        plain.codes[b, head, own] = keys.codes[b, head, : tokens[b]]
        plain.scales[b, head, own] = keys.scales[b, head, : tokens[b]]
    plain.lengths.copy_(keys.lengths)
    scan = PrunedScan(keys, group, k, SMALL)
    scan.search_clusters(query, keys, table.centroids, scan.counters(keys))
    found, counts = scan.found(keys)
    assert torch.equal(counts, keys.lengths.long())
    assert torch.equal(found.sort(3).values, DeviceScan(plain, group, k, SMALL).search(query, plain).sort(3).values)


def test_more_clusters_than_a_program_holds(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is then of an even sample."""
    monkeypatch.setattr(pruned_scan, "_SAMPLE", 32)
    table = Table([2000], "even", 64, device)
    keys, query = table.keys, table.asked(3)
    scan = PrunedScan(keys, 3, 50, SMALL)
    clusters = int((table.sizes[0, 0] > 0).sum())
    for share, least, most in ((0.5, 0.25, 0.75), (1.0, 1.0, 1.0)):
        keys.want(share, 1)
        scan.search_clusters(query, keys, table.centroids, scan.counters(keys))
        ranks = scan.ranks.view(1, KV_HEADS, 3, -1)
        chosen = chosen_by(scan, ranks)
        assert (chosen.sum(3) >= least * clusters).all()
        assert (chosen.sum(3) <= most * clusters).all()
        members = scanned_by(chosen, table.assignment, [2000])
        found, _ = scan.found(keys)
        assert torch.equal(found.sort(3).values, best_scanned(query, keys, members, 50).sort(3).values)


@pytest.mark.parametrize(("tokens", "group", "dim", "k"), CASES)
def test_unions_are_of_tokens(device: str, tokens: list[int], group: int, dim: int, k: int) -> None:
    table = Table(tokens, "ragged", dim, device)
    keys, query = table.keys, table.asked(group)
    keys.want(0.2, 1)
    scan = PrunedScan(keys, group, k, SMALL)
    scan.search_clusters(query, keys, table.centroids, scan.counters(keys))
    places = torch.full((len(tokens), KV_HEADS, group * k), 77, dtype=torch.int32, device=device)
    steps = torch.zeros(len(tokens), KV_HEADS, dtype=torch.int32, device=device)
    union = Union(4, places.clone(), places, torch.zeros_like(steps).long(), steps, table.assignment, None)
    scan.unite(keys, union, query)
    expected = union_of(scan.found(keys)[0], 4)
    assert torch.equal(union.positions, expected)
    assert torch.equal(union.counts, (expected >= 0).sum(2))
    there = table.assignment.gather(2, (expected - 4).clamp(min=0).long()).masked_fill(expected < 0, -1)
    assert torch.equal(union.clusters, there)


def test_keys_in_clusters_keep_their_order() -> None:
    keys = ClusteredKeys(1, 1, 10, 64, 4, torch.device("cpu"))
    states = torch.randn(1, 1, 5, 64, generator=torch.Generator().manual_seed(0))
    keys.put(slice(0, 1), states)
    plain = keys.codes[0, 0, :5].clone()
    keys.arrange(slice(0, 1), torch.tensor([[[2, 0, 2, 0, 0]]]), 3)
    assert keys.tokens[0, 0, :5].tolist() == [1, 3, 4, 0, 2]
    assert keys.starts[0, 0].tolist() == [0, 3, 3, 5, 5]
    assert torch.equal(keys.codes[0, 0, :5], plain[[1, 3, 4, 0, 2]])
    keys.grow(slice(0, 1), states[:, :, :2])
    keys.arrange(slice(0, 1), torch.tensor([[[3, 3]]]), 4)
    assert keys.tokens[0, 0, :7].tolist() == [1, 3, 4, 0, 2, 5, 6]
    assert keys.starts[0, 0].tolist() == [0, 3, 3, 5, 7]
    for share, least, wanted in ((0.5, 1, 2), (0.1, 3, 3), (0.1, 4, ALL), (1.0, 1, ALL)):
        keys.want(share, least)
        assert keys.wanted.tolist() == [[wanted]]


def test_clusters_that_do_not_fit() -> None:
    keys = ClusteredKeys(1, 1, 10, 64, 2, torch.device("cpu"))
    keys.put(slice(0, 1), torch.ones(1, 1, 5, 64))
    with pytest.raises(ValueError, match="clusters: got 3, allowed: at most 2"):
        keys.arrange(slice(0, 1), torch.zeros(1, 1, 5), 3)
    with pytest.raises(ValueError, match="assignment: got one of 2 keys, allowed: of all 5"):
        keys.arrange(slice(0, 1), torch.zeros(1, 1, 2), 2)
