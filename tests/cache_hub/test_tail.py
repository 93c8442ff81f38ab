"""The centroid tail against a plain evaluation of its definition, and its limits."""

import pytest
import torch

from attn_hub import WeightedPart, weighted_decode_attention
from attn_hub.reference import partial_attention
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


def attend(
    tail: CentroidTail, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Attention to the clusters and, exactly, to the tokens ids, as a cache with `tail` attends to them."""
    clusters, _ = tail.part(query)
    of = tail.clusters_of(ids, 0, slice(0, len(ids)))
    return weighted_decode_attention(
        query, [clusters, WeightedPart(keys, values, ids, stand_ins=tail.centroids, stand_in_ids=of)]
    )


def plain(
    tail: CentroidTail, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Attention to the tokens ids and to what is left of every cluster, one by one, in float64: [B, 1, H, D]."""
    batch, heads = tail.sizes.shape[:2]
    group, dim = query.shape[2] // heads, query.shape[3]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(batch):
        for head in range(query.shape[2]):
            kv, asked = head // group, query[b, 0, head].double() / dim**0.5
            gone = sorted(set(ids[b, kv].tolist()) - {-1})
            weights = [(asked @ keys[b, kv, token].double()).exp() for token in gone]
            means = [values[b, kv, token].double() for token in gone]
            for cluster in range(tail.clusters[b]):
                members = (tail.assignment[b, kv, : tail._tokens[b]] == cluster).nonzero().flatten().tolist()
                left = [token for token in members if token not in gone]
                if left:
                    weights.append(len(left) * (asked @ tail.centroids[b, kv, cluster].double()).exp())
                    means.append(values[b, kv, left].double().mean(0))
            share = torch.stack(weights) / sum(weights)
            out[b, 0, head] = share @ torch.stack(means)
    return out


@pytest.mark.parametrize(
    ("rows", "n", "group", "dim", "retrieved"),
    [((1, 1), 1, 1, 64, 0), ((1, 1), 63, 1, 64, 0), ((2, 2), 127, 3, 64, 40), ((1, 2), 97, 4, 128, 90)],
)
def test_what_is_retrieved_leaves_its_clusters(
    rows: tuple[int, int], n: int, group: int, dim: int, retrieved: int
) -> None:
    tail, keys, values = make(rows, n, dim)
    ids = some_ids(rows, n, retrieved)
    query = torch.randn(rows[0], 1, rows[1] * group, dim)
    attended = attend(tail, query, keys, values, ids)
    torch.testing.assert_close(attended.double(), plain(tail, query, keys, values, ids), atol=1e-5, rtol=1e-5)
    assert tail.attended == int((tail.sizes > 0).sum())
    assert round(float(tail.part(query)[0].log_weights.exp().sum())) == rows[0] * rows[1] * n


def test_a_bfloat16_store_loses_no_more_than_its_rounding() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, 400, 64).bfloat16(), torch.randn(1, 2, 400, 64).bfloat16()
    tail = CentroidTail(1, 2, 64, torch.bfloat16, torch.device("cpu"))
    tail.add(slice(0, 1), keys, values, moment(2, 64))
    ids, query = some_ids((1, 2), 400, 100), torch.randn(1, 1, 6, 64)
    expected = plain(tail, query, keys, values, ids)
    error = (attend(tail, query, keys, values, ids) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 0.02


@pytest.mark.parametrize("scale", [1, 8])
def test_nothing_is_left_where_everything_is_retrieved(scale: float) -> None:
    """Also where a few tokens have nearly all of the mass, and centroids far less than their members."""
    tail, keys, values = make((1, 2), 50, 64)
    ids, query = torch.arange(50).int().repeat(1, 2, 1), scale * torch.randn(1, 1, 6, 64)
    exact = weighted_decode_attention(query, [WeightedPart(keys, values)])
    torch.testing.assert_close(attend(tail, query, keys, values, ids), exact, atol=1e-5, rtol=1e-5)


def test_clusters_of_one_token_are_exact_whatever_is_retrieved() -> None:
    tail, keys, values = make((1, 1), 40, 64)
    tail.assignment = torch.arange(40).view(1, 1, 40).int()
    tail.centroids, tail.value_means, tail.sizes, tail.clusters = keys, values, torch.ones(1, 1, 40), [40]
    tail.log_sizes = tail.sizes.log()
    query, ids = torch.randn(1, 1, 3, 64), some_ids((1, 1), 40, 11)
    expected = weighted_decode_attention(query, [WeightedPart(keys, values)])
    torch.testing.assert_close(attend(tail, query, keys, values, ids), expected, atol=1e-5, rtol=1e-5)


def test_equal_keys_are_exact_whatever_is_retrieved() -> None:
    keys, values = torch.randn(64).expand(1, 1, 40, 64), torch.randn(1, 1, 40, 64)
    tail = CentroidTail(1, 1, 64, torch.float32, torch.device("cpu"))
    tail.add(slice(0, 1), keys, values, moment(1, 64))
    query, ids = torch.randn(1, 1, 3, 64), some_ids((1, 1), 40, 11)
    expected = values[0, 0].mean(0).expand(1, 1, 3, 64)
    torch.testing.assert_close(attend(tail, query, keys, values, ids), expected, atol=1e-5, rtol=1e-5)


def test_the_estimated_mass_is_a_lower_bound() -> None:
    """Jensen: a cluster weighs as if all its members had their mean logit."""
    tail, keys, _ = make((1, 1), 300, 64)
    query = 3 * torch.randn(1, 1, 3, 64)
    estimated = partial_attention(query, tail.part(query)[0])[1]
    assert bool((estimated <= (query[0, 0] @ keys[0, 0].T / 8).logsumexp(-1) + 1e-5).all())


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.2, 6)])
def test_a_share_of_the_clusters_is_the_one_of_largest_mass(share: float, expected: int) -> None:
    tail, _, _ = make((1, 1), 300, 64)
    tail.share = share
    query = torch.randn(1, 1, 1, 64)
    part, chosen = tail.part(query)
    assert tail.attended == expected
    mass = tail.sizes[0, 0].log() + tail.centroids[0, 0] @ query[0, 0, 0] / 8
    best = set(mass.topk(expected).indices.tolist())
    assert {i for i, weight in enumerate(part.log_weights[0, 0].tolist()) if weight > float("-inf")} == best
    assert chosen is not None
    assert set(chosen[0, 0].nonzero().flatten().tolist()) == best


def test_sequences_of_different_lengths_keep_their_clusters_apart() -> None:
    torch.manual_seed(0)
    tail = CentroidTail(2, 1, 64, torch.float32, torch.device("cpu"))
    long, short = torch.randn(2, 1, 1, 200, 64), torch.randn(2, 1, 1, 50, 64)
    tail.add(slice(1, 2), long[0], long[1], moment(1, 64))
    tail.add(slice(0, 1), short[0], short[1], moment(1, 64))
    ids = torch.tensor([[[3, 7, -1]], [[199, 0, 5]]], dtype=torch.int32)
    stores = [torch.cat((torch.nn.functional.pad(b, (0, 0, 0, 150)), a)) for a, b in zip(long, short, strict=True)]
    query = torch.randn(2, 1, 3, 64)
    attended = attend(tail, query, *stores, ids)
    torch.testing.assert_close(attended.double(), plain(tail, query, *stores, ids), atol=1e-5, rtol=1e-5)


def test_clusters_are_found_behind_the_sinks() -> None:
    tail, _, _ = make((2, 2), 40, 64)
    positions = torch.tensor([[[3, -1, 42]], [[5, 4, 3]]]).expand(2, 2, 3).int()
    found = tail.clusters_of(positions, 3, slice(0, 2))
    first, last = tail.assignment[0, 1, [0, 39]].tolist()
    assert found[0, 1].tolist() == [first, -1, last]
    assert torch.equal(tail.clusters_of(positions[1:], 3, slice(1, 2))[0], tail.assignment[1][:, [2, 1, 0]])


def test_room_for_batches_to_come_is_there_at_once() -> None:
    """So that what a CUDA graph has captured stays where it is."""
    torch.manual_seed(0)
    tail = CentroidTail(1, 1, 64, torch.float32, torch.device("cpu"), grown=(2, 30))
    places = []
    for tokens in (100, 30, 30):
        keys = torch.randn(1, 1, tokens, 64)
        tail.add(slice(0, 1), keys, keys, moment(1, 64))
        places.append([table.data_ptr() for table in (tail.centroids, tail.value_means, tail.log_sizes)])
    assert places[0] == places[1] == places[2]
    assert tail.clusters == [16]
    assert tail.tables()["assignment"].shape == (1, 1, 160)
    assert float(tail.sizes.sum()) == 160


@pytest.mark.parametrize("dim", [64, 128])
def test_bytes_are_at_most_an_eighth_of_a_bfloat16_store(dim: int) -> None:
    tail = CentroidTail(1, 1, dim, torch.bfloat16, torch.device("cpu"))
    keys = torch.randn(1, 1, 4096, dim).bfloat16()
    tail.add(slice(0, 1), keys, keys, moment(1, dim))
    assert tail.nbytes <= 2 * keys.nbytes / 8
