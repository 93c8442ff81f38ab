"""The scan on the device, against plain torch to the last bit: ragged lengths, ties, fewer keys than are wanted."""

import pytest
import torch
from scan_oracle import best_of, scores_of, union_of

from cache_hub.index.device_keys import DeviceKeys
from cache_hub.index.key_store import CompactKeys

pytest.importorskip("triton")
from cache_hub.index.device_scan import DeviceScan, ScanTuning, Union

SMALL = ScanTuning(keys=64, stages=1, programs=3, run=16)


def table(lengths: list[int], kind: str, dim: int, device: str, kv_heads: int = 2) -> DeviceKeys:
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    keys = DeviceKeys(len(lengths), kv_heads, max(lengths) + 5, dim, torch.device(device))
    for b, length in enumerate(lengths):
        states = torch.randn(1, kv_heads, length, dim, generator=generator) + torch.randn(dim, generator=generator)
        if kind == "constant":
            states = states[:, :, :1].expand_as(states)
        elif kind == "ties":
            states = states[:, :, torch.arange(length) % 7]
        elif kind == "two":
            states = states[:, :, (torch.arange(length) % 11 == 3).long().clamp(max=length - 1)]
        elif kind == "one huge":
            states[:, :, length // 2 : length // 2 + 1] *= 1000
        if length:
            keys.put(slice(b, b + 1), states.to(device))
    return keys


def asked(keys: DeviceKeys, group: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    batch, kv_heads, _, dim = keys.codes.shape
    generator = torch.Generator().manual_seed(dim)
    return torch.randn(batch, 1, kv_heads * group, dim, generator=generator).to(keys.codes.device, dtype)


CASES = [
    ([1], 1, 64, 5), ([63], 3, 64, 10), ([127], 4, 128, 100), ([1000], 4, 128, 100), ([1000], 1, 64, 17),
    ([997, 0, 63], 3, 80, 100), ([300, 1021], 7, 64, 33), ([40], 9, 64, 3), ([700], 4, 64, 1), ([250], 2, 64, 300),
]  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "group", "dim", "k", "kind"),
    [(*case, "plain") for case in CASES]
    + [(*case, kind) for case in CASES[1:7:2] for kind in ("constant", "ties", "two", "one huge")],
)
def test_the_best_are_those_of_a_sort(device: str, lengths: list[int], group: int, dim: int, k: int, kind: str) -> None:
    keys = table(lengths, kind, dim, device)
    query = asked(keys, group)
    scan = DeviceScan(keys, group, k, SMALL)
    scan.scores.fill_(float("nan"))  # what no program writes must not be read
    found = scan.search(query, keys)
    expected = scores_of(query, keys)
    there = expected > float("-inf")
    assert torch.equal(scan.scores.view_as(expected)[there], expected[there])
    assert torch.equal(found, best_of(expected, keys.lengths, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tuning", [SMALL, ScanTuning(), ScanTuning(keys=256, stages=1, programs=1, run=128)])
def test_tiles_and_types(device: str, tuning: ScanTuning, dtype: torch.dtype) -> None:
    keys = table([1500], "plain", 128, device)
    query = asked(keys, 4, dtype)
    found = DeviceScan(keys, 4, 100, tuning).search(query, keys)
    assert torch.equal(found, best_of(scores_of(query, keys), keys.lengths, 100))


def test_nothing_is_asked_by_a_zero(device: str) -> None:
    keys = table([200], "plain", 64, device)
    found = DeviceScan(keys, 2, 20, SMALL).search(torch.zeros_like(asked(keys, 2)), keys)
    assert torch.equal(found, torch.arange(20, device=device).int().expand(1, 2, 2, 20))


@pytest.mark.parametrize(("lengths", "group", "dim", "k"), CASES)
@pytest.mark.parametrize("clustered", [True, False])
def test_unions_name_every_key_once(
    device: str, lengths: list[int], group: int, dim: int, k: int, clustered: bool
) -> None:
    keys = table(lengths, "plain", dim, device)
    batch, kv_heads, room, _ = keys.codes.shape
    query = asked(keys, group)
    # Heads that ask nearly the same find much the same.
    query = query[:, :, :1] + 0.3 * query
    scan = DeviceScan(keys, group, k, SMALL)
    assignment = torch.arange(batch * kv_heads * room, device=device).int().view(batch, kv_heads, room)
    places = torch.full((batch, kv_heads, group * k), 77, dtype=torch.int32, device=device)
    steps = torch.full((batch, kv_heads), 2, dtype=torch.int32, device=device)
    ring = torch.zeros(3, batch, kv_heads * group, dim, device=device)
    union = Union(
        4, places.clone(), places, torch.full_like(steps, 5).long(), steps, assignment if clustered else None, ring
    )
    scan.search(query, keys)
    for _ in range(2):
        scan.unite(keys, union, query)
    expected = union_of(scan.ids, 4)
    assert torch.equal(union.positions, expected)
    found = (expected >= 0).sum(2)
    assert torch.equal(union.counts, 5 + 2 * found)
    if clustered:
        clusters = assignment.gather(2, (expected - 4).clamp(min=0).long()).masked_fill(expected < 0, -1)
        assert torch.equal(union.clusters, clusters)
    assert torch.equal(steps, torch.full_like(steps, 4))
    assert torch.equal(ring, torch.stack((query[:, 0], 0 * query[:, 0], query[:, 0])))


def test_without_a_ring_no_step_is_counted(device: str) -> None:
    keys = table([100], "plain", 64, device)
    query = asked(keys, 3)
    scan = DeviceScan(keys, 3, 10, SMALL)
    places, steps = (torch.zeros(1, 2, n, dtype=torch.int32, device=device) for n in (30, 1))
    scan.search(query, keys)
    scan.unite(keys, Union(0, places, places, steps[..., 0].long(), steps[..., 0], None, None), query)
    assert torch.equal(places, union_of(scan.ids, 0))
    assert not steps.any()


def test_codes_are_those_of_compact_keys() -> None:
    """Put, then grown by two batches: as CompactKeys over the same, whose means are the first keys' too."""
    torch.manual_seed(0)
    states = torch.randn(2, 3, 90, 64).bfloat16() + 2
    keys = DeviceKeys(2, 3, 90, 64, torch.device("cpu"))
    compact = CompactKeys.of(states[:, :, :50].flatten(0, 1))
    keys.put(slice(0, 2), states[:, :, :50])
    for stop in (51, 90):
        keys.grow(slice(0, 2), states[:, :, len(compact.scales[0]) : stop])
        compact = compact.grown(states[:, :, :stop].flatten(0, 1))
    torch.testing.assert_close(keys.means.flatten(0, 1), compact.means)
    torch.testing.assert_close(keys.scales[:, :, :90].flatten(0, 1), compact.scales)
    codes = keys.codes[:, :, :90].flatten(0, 1).int() - compact.codes.int()
    assert codes.abs().max() <= 1  # halves, where the order of the mean's sum tells
    assert codes.ne(0).float().mean() < 1e-3
    assert keys.counts == [90, 90]
    assert keys.lengths.eq(90).all()


def test_more_keys_than_room() -> None:
    keys = DeviceKeys(1, 1, 200, 64, torch.device("cpu"))
    with pytest.raises(ValueError, match="got 257, allowed: at most 256"):
        keys.put(slice(0, 1), torch.zeros(1, 1, 257, 64))


@pytest.mark.parametrize("k", [0, 1025])
def test_counts_that_no_program_holds(k: int) -> None:
    keys = DeviceKeys(1, 1, 200, 64, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"top_k: got {k}, allowed: 1 to 1024"):
        DeviceScan(keys, 1, k)


@pytest.mark.parametrize("dim", [64, 128])
def test_eight_bits_find_what_all_bits_do(dim: int) -> None:
    """Recall@100 of the codes' scores against those of the keys, with a mean that says nothing."""
    torch.manual_seed(0)
    states = torch.randn(1, 2, 20000, dim) + 3 * torch.randn(dim)
    keys = DeviceKeys(1, 2, 20000, dim, torch.device("cpu"))
    keys.put(slice(0, 1), states)
    query = asked(keys, 4)
    exact = (query.view(1, 2, 4, dim) @ states.transpose(2, 3)).topk(100, 3).indices
    found = best_of(scores_of(query, keys), keys.lengths, 100)
    assert (exact[..., :, None] == found[..., None, :]).any(3).float().mean() > 0.95
