"""The centroid tail against a plain evaluation of its definition, and its limits."""

import pytest
import torch

from attn_hub.reference import partial_attention, reference_weighted_decode_attention
from cache_hub.tail import CentroidTail


def make(rows: tuple[int, int], n: int, dim: int) -> tuple[CentroidTail, torch.Tensor, torch.Tensor]:
    """A tail over random keys and values [B, Hkv, n, D]."""
    torch.manual_seed(0)
    keys, values = torch.randn(*rows, n, dim), torch.randn(*rows, n, dim)
    tail = CentroidTail(*rows, dim, torch.float32, torch.device("cpu"))
    tail.add(slice(0, rows[0]), keys, values, moment(rows[0] * rows[1], dim))
    return tail, keys, values


def moment(rows: int, dim: int) -> torch.Tensor:
    queries = torch.randn(rows, 2 * dim, dim)
    return queries.transpose(1, 2) @ queries / queries.shape[1]


def some_ids(rows: tuple[int, int], n: int, count: int) -> torch.Tensor:
    """[B, Hkv, count + 2] int32: distinct ids in any order, pads among them."""
    ids = torch.stack([torch.randperm(n)[:count] for _ in range(rows[0] * rows[1])]).view(*rows, count)
    pads = torch.full((*rows, 1), -1)
    return torch.cat((pads, ids, pads), 2).int()


def plain(
    tail: CentroidTail, query: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, lengths: list[int] | None = None
) -> torch.Tensor:
    """Attention over what is left of every cluster, one by one, in float64: [B, 1, H, D]. lengths: of the sequences."""
    batch, heads = tail.sizes.shape[:2]
    group, dim = query.shape[2] // heads, query.shape[3]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(batch):
        for head in range(query.shape[2]):
            gone = set(ids[b, head // group].tolist())
            weights, means = [], []
            for cluster in range(tail.clusters[b]):
                assignment = tail.assignment[b, head // group, : lengths[b] if lengths else None]
                members = (assignment == cluster).nonzero().flatten().tolist()
                left = [token for token in members if token not in gone]
                if left:
                    logit = query[b, 0, head].double() @ tail.centroids[b, head // group, cluster].double() / dim**0.5
                    weights.append(len(left) * logit.exp())
                    means.append(values[b, head // group, left].double().mean(0))
            share = torch.stack(weights) / sum(weights)
            out[b, 0, head] = share @ torch.stack(means)
    return out


@pytest.mark.parametrize(
    ("rows", "n", "group", "dim", "retrieved"),
    [((1, 1), 1, 1, 64, 0), ((1, 1), 63, 1, 64, 0), ((2, 2), 127, 3, 64, 40), ((1, 2), 97, 4, 128, 90)],
)
def test_parts_are_the_clusters_less_what_was_retrieved(
    rows: tuple[int, int], n: int, group: int, dim: int, retrieved: int
) -> None:
    tail, _, values = make(rows, n, dim)
    ids = some_ids(rows, n, retrieved)
    query = torch.randn(rows[0], 1, rows[1] * group, dim)
    parts, count = tail.parts(query, ids, values, 0)
    expected = plain(tail, query, values, ids)
    torch.testing.assert_close(
        reference_weighted_decode_attention(query, parts).double(), expected, atol=1e-5, rtol=1e-5
    )
    gone = torch.zeros(*rows, n).scatter_add_(2, ids.clamp(min=0).long(), (ids >= 0).float())
    left = torch.zeros(tail.sizes.shape).scatter_add_(2, tail.assignment.long(), 1 - gone)
    assert count == int((left > 0).sum())
    tokens = sum(part.log_weights.exp().sum() for part in parts)
    assert round(float(tokens)) == rows[0] * rows[1] * (n - retrieved)


def test_a_bfloat16_store_loses_no_more_than_its_rounding() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, 400, 64).bfloat16(), torch.randn(1, 2, 400, 64).bfloat16()
    tail = CentroidTail(1, 2, 64, torch.bfloat16, torch.device("cpu"))
    tail.add(slice(0, 1), keys, values, moment(2, 64))
    ids, query = some_ids((1, 2), 400, 100), torch.randn(1, 1, 6, 64)
    parts, _ = tail.parts(query, ids, values, 0)
    expected = plain(tail, query, values, ids)
    error = (reference_weighted_decode_attention(query, parts) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 0.02


def test_nothing_is_left_where_everything_is_retrieved() -> None:
    tail, _, values = make((1, 2), 50, 64)
    ids = torch.arange(50).int().repeat(1, 2, 1)
    parts, count = tail.parts(torch.randn(1, 1, 6, 64), ids, values, 0)
    assert count == 0
    assert all(bool((part.log_weights == float("-inf")).all()) for part in parts)


def test_clusters_of_one_token_are_exact_whatever_is_retrieved() -> None:
    tail, keys, values = make((1, 1), 40, 64)
    tail._reserve(41, 40)
    tail.assignment = torch.arange(40).view(1, 1, 40).int()
    tail.centroids[:, :, :40], tail.value_means[:, :, :40] = keys, values
    tail.sizes[:], tail.sizes[..., 40] = 1, 0
    tail.log_sizes = tail.sizes.log()
    query, ids = torch.randn(1, 1, 3, 64), some_ids((1, 1), 40, 11)
    kept = [token for token in range(40) if token not in set(ids.flatten().tolist())]
    parts, _ = tail.parts(query, ids, values, 0)
    expected = (query[0, 0] @ keys[0, 0, kept].T / 8).softmax(-1) @ values[0, 0, kept]
    torch.testing.assert_close(reference_weighted_decode_attention(query, parts)[0, 0], expected, atol=1e-5, rtol=1e-5)


def test_equal_keys_are_exact_whatever_is_retrieved() -> None:
    keys, values = torch.randn(64).expand(1, 1, 40, 64), torch.randn(1, 1, 40, 64)
    tail = CentroidTail(1, 1, 64, torch.float32, torch.device("cpu"))
    tail.add(slice(0, 1), keys, values, moment(1, 64))
    query, ids = torch.randn(1, 1, 3, 64), some_ids((1, 1), 40, 11)
    kept = [token for token in range(40) if token not in set(ids.flatten().tolist())]
    parts, _ = tail.parts(query, ids, values, 0)
    expected = values[0, 0, kept].mean(0).expand(3, 64)
    torch.testing.assert_close(reference_weighted_decode_attention(query, parts)[0, 0], expected, atol=1e-5, rtol=1e-5)


def test_the_estimated_mass_is_a_lower_bound() -> None:
    """Jensen: a cluster weighs as if all its members had their mean logit."""
    tail, keys, values = make((1, 1), 300, 64)
    query, ids = 3 * torch.randn(1, 1, 3, 64), torch.full((1, 1, 5), -1, dtype=torch.int32)
    parts, _ = tail.parts(query, ids, values, 0)
    estimated = torch.stack([partial_attention(query, part)[1] for part in parts]).logsumexp(0)
    assert bool((estimated <= (query[0, 0] @ keys[0, 0].T / 8).logsumexp(-1) + 1e-5).all())


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.2, 6), (1.0, 30)])
def test_a_share_of_the_clusters_is_the_one_of_largest_mass(share: float, expected: int) -> None:
    tail, _, values = make((1, 1), 300, 64)
    tail.share = share
    query, ids = torch.randn(1, 1, 1, 64), some_ids((1, 1), 300, 20)
    parts, count = tail.parts(query, ids, values, 0)
    assert count == expected
    mass = tail.sizes[0, 0].log() + tail.centroids[0, 0] @ query[0, 0, 0] / 8
    best = set(mass.topk(expected).indices.tolist())
    touched = set(tail.assignment[0, 0, ids[ids >= 0].long()].tolist())
    whole = {i for i, weight in enumerate(parts[0].log_weights[0, 0].tolist()) if weight > float("-inf")}
    assert whole == best - touched


def test_sequences_of_different_lengths_keep_their_clusters_apart() -> None:
    torch.manual_seed(0)
    tail = CentroidTail(2, 1, 64, torch.float32, torch.device("cpu"))
    long, short = torch.randn(2, 1, 1, 200, 64), torch.randn(2, 1, 1, 50, 64)
    tail.add(slice(1, 2), long[0], long[1], moment(1, 64))
    tail.add(slice(0, 1), short[0], short[1], moment(1, 64))
    ids = torch.tensor([[[3, 7, -1]], [[199, 0, 5]]], dtype=torch.int32)
    values = torch.stack((torch.nn.functional.pad(short[1, 0], (0, 0, 0, 150)), long[1, 0]))
    query = torch.randn(2, 1, 3, 64)
    parts, _ = tail.parts(query, ids, values, 0)
    expected = plain(tail, query, values, ids, [50, 200])
    torch.testing.assert_close(
        reference_weighted_decode_attention(query, parts).double(), expected, atol=1e-5, rtol=1e-5
    )


def taken_away(
    tail: CentroidTail, positions: torch.Tensor, values: torch.Tensor, first: int
) -> tuple[list[torch.Tensor], int]:
    """What `_take_away` says, in torch operations, as [B, Hkv, T] and [B, Hkv, T, D]; clusters are 0 to C - 1."""
    number = tail.sizes.shape[2] - 1
    ids = torch.where(positions >= 0, positions - first, -1)
    cluster = tail.assignment.gather(2, ids.clamp(min=0).long()).long().masked_fill_(ids < 0, number)
    cluster, order = cluster.sort(dim=2)
    slot = (cluster.diff(dim=2, prepend=torch.full_like(cluster[..., :1], -1)) != 0).cumsum(2) - 1
    member = (cluster < number).float()
    lost = torch.zeros_like(member).scatter_add_(2, slot, member)
    wide = (*positions.shape, values.shape[3])
    rows = values.float().take_along_dim(positions.clamp(min=0).long().gather(2, order)[..., None], 2)
    lost_values = torch.zeros(wide).scatter_add_(2, slot[..., None].expand(wide), rows * member[..., None])
    touched = torch.full_like(cluster, number).scatter_(2, slot, cluster)
    sizes = tail.sizes.gather(2, touched)
    left = (sizes - lost).where(touched < number, torch.tensor(0.0))
    some = left > 0
    scale = torch.where(some, sizes / left.clamp(min=1), 0)
    lost_mean = torch.where(some[..., None], lost_values / left.clamp(min=1)[..., None], 0)
    emptied = (touched < number) & ~some
    return [touched, left.log(), scale, lost_mean], int((tail.sizes > 0).sum() - emptied.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 65])
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (2, 2)])
def test_the_bookkeeping_is_that_of_plain_torch(rows: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    """Few and many clusters, of which some lose every member, and some positions, none or all of them pads."""
    torch.manual_seed(0)
    n, first = 301, 3
    for number in (1, 7, 150):
        tail = CentroidTail(*rows, dim, dtype, torch.device("cpu"), num_threads=2)
        tail._reserve(number + 1, n)
        tail.assignment = torch.randint(0, number, (*rows, n), dtype=torch.int32)
        tail.sizes = torch.zeros(*rows, number + 1).scatter_add_(2, tail.assignment.long(), torch.ones(*rows, n))
        values = torch.randn(*rows, n + 9, 2 * dim).to(dtype)[..., dim:]
        for ids in (
            torch.full((*rows, 1), -1, dtype=torch.int32),
            torch.full((*rows, 63), -1, dtype=torch.int32),
            some_ids(rows, n, 61),
            some_ids(rows, n, 99),
            some_ids(rows, n, n),
            some_ids(rows, n, 1)[..., 1:2].contiguous(),
        ):
            positions = torch.where(ids >= 0, ids + first, -1)
            tables, count = tail._take_away(positions, values, first)
            expected, expected_count = taken_away(tail, positions, values, first)
            assert count == expected_count
            begin = torch.arange(rows[0] * rows[1]).view(*rows, 1) * (number + 1)
            assert torch.equal(tables[0].view(positions.shape) - begin, expected[0])
            for table, wanted in zip(tables[1:], expected[1:], strict=True):
                torch.testing.assert_close(table.view(wanted.shape), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", [0, 2, 43, 1000])
def test_a_position_that_is_not_indexed_is_an_error(position: int) -> None:
    tail, _, values = make((1, 1), 40, 64)
    values = torch.nn.functional.pad(values, (0, 0, 3, 5))
    positions = torch.tensor([[[3, position, -1]]], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"positions: got {position}, allowed: -1 and 3 to 42"):
        tail.parts(torch.randn(1, 1, 1, 64), positions, values, 3)


def test_what_the_native_code_cannot_read_is_an_error() -> None:
    tail, _, values = make((1, 2), 40, 64)
    query, positions = torch.randn(1, 1, 2, 64), torch.zeros(1, 2, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"positions: got torch\.int64"):
        tail.parts(query, positions.long(), values, 0)
    with pytest.raises(ValueError, match=r"positions: got torch\.int32 on cpu with strides \(10, 1, 2\)"):
        tail.parts(query, positions.transpose(1, 2).contiguous().transpose(1, 2), values, 0)
    with pytest.raises(ValueError, match="positions, values: got"):
        tail.parts(query, positions, values[..., :32], 0)
    with pytest.raises(ValueError, match="first: got 1, allowed: 0 to 0, for 40 tokens"):
        tail.parts(query, positions, values, 1)


@pytest.mark.parametrize("dim", [64, 128])
def test_bytes_are_at_most_an_eighth_of_a_bfloat16_store(dim: int) -> None:
    tail = CentroidTail(1, 1, dim, torch.bfloat16, torch.device("cpu"))
    keys = torch.randn(1, 1, 4096, dim).bfloat16()
    tail.add(slice(0, 1), keys, keys, moment(1, dim))
    assert tail.nbytes <= 2 * keys.nbytes / 8
