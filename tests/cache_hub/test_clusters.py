"""Clustering of keys: against a float64 evaluation of its definition, its counts, edge cases and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import wave_oracle

from cache_hub import clusters as clusters_module
from cache_hub.clusters import ClusterCounts, cluster_keys


def bundles(rows: int, count: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [R, N, D] around 40 directions with a common offset, as real keys lie, and random values."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    centres, which = 3 * draw(rows, 40, dim), torch.randint(40, (rows, count), generator=generator)
    keys = centres.gather(1, which[..., None].expand(-1, -1, dim)) + draw(rows, count, dim) + 5 * draw(rows, 1, dim)
    return keys, draw(rows, count, dim)


@pytest.mark.parametrize(
    ("count", "segments", "centroids", "iterations"),
    [(1000, 1, 64, 10), (1003, 4, 64, 10), (777, 3, 24, 2), (50, 1, 50, 1), (513, 2, 2, 10), (1, 1, 1, 10)],
)
def test_clusters_equal_the_float64_evaluation(count: int, segments: int, centroids: int, iterations: int) -> None:
    keys, values = bundles(3, count, 32)
    found = cluster_keys(keys, values, segments, centroids, iterations)
    for row in range(3):
        means, sizes, sums, assignment = wave_oracle.cluster(
            keys[row].numpy(), values[row].numpy(), segments, centroids, iterations
        )
        assert np.array_equal(found.assignment[row], assignment)
        assert np.array_equal(found.sizes[row], sizes)
        np.testing.assert_allclose(found.centroids[row], means, atol=2e-5)
        np.testing.assert_allclose(found.value_sums[row], sums, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float32_sums_over_the_members(dtype: torch.dtype) -> None:
    keys, values = (states.to(dtype) for states in bundles(2, 400, 16))
    found = cluster_keys(keys, values, 2, 32)
    assert found.centroids.dtype == found.value_sums.dtype == torch.float32
    assert found.sizes.dtype == found.assignment.dtype == torch.int32
    assert bool((found.sizes.sum(1) == 400).all())
    member = found.assignment[..., None] == torch.arange(32)
    assert torch.equal(member.sum(1, dtype=torch.int32), found.sizes)
    sums = member.double().transpose(1, 2) @ keys.double()
    kept = found.sizes > 0
    means = sums / found.sizes.clamp(min=1)[..., None]
    torch.testing.assert_close(found.centroids[kept].double(), means[kept], atol=1e-5, rtol=1e-5)
    value_sums = member.double().transpose(1, 2) @ values.double()
    torch.testing.assert_close(found.value_sums.double(), value_sums, atol=1e-4, rtol=1e-4)
    assert found.nbytes == 2 * (32 * (2 * 16 + 1) + 400) * 4


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = bundles(5, 300, 16)
    whole = cluster_keys(keys, values, 3, 24)
    monkeypatch.setattr(clusters_module, "_SCORES_ON_CPU", 24 * 7)
    monkeypatch.setattr(clusters_module, "_KEYS_AT_ONCE", 2 * 300 * 16)
    parts = cluster_keys(keys, values, 3, 24)
    assert torch.equal(parts.assignment, whole.assignment)
    torch.testing.assert_close(parts.centroids, whole.centroids)
    torch.testing.assert_close(parts.value_sums, whole.value_sums)


def test_two_calls_are_identical() -> None:
    keys, values = bundles(2, 500, 64)
    first, second = (cluster_keys(keys, values, 2, 32) for _ in range(2))
    for name in ("centroids", "sizes", "value_sums", "assignment"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.3])
def test_equal_keys_share_one_cluster_and_the_others_stay_empty(value: float) -> None:
    keys = torch.full((2, 100, 8), value)
    values = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(0))
    found = cluster_keys(keys, values, 2, 16)
    assert bool((found.sizes.sum(1) == 100).all())
    assert found.sizes.max() == 100
    assert bool(torch.isfinite(found.centroids).all())
    used = found.sizes > 0
    torch.testing.assert_close(found.centroids[used], keys[:, :1].expand(-1, 16, -1)[used])
    torch.testing.assert_close(found.value_sums.sum(1), values.sum(1))


def test_an_empty_cluster_keeps_its_stale_direction() -> None:
    axes = torch.eye(4).repeat(8, 1)[None] * 3
    axes = torch.cat((axes, -axes), 1)  # the mean is 0, every direction is there eight times
    found = cluster_keys(axes, axes, 1, 16)
    empty = found.sizes == 0
    assert bool(empty.any())
    assert bool((found.value_sums[empty] == 0).all())
    norms = found.centroids[empty].norm(dim=-1)
    assert bool(((norms - 1).abs() < 1e-5).logical_or((norms - 3).abs() < 1e-5).all()), "a unit vector or a start row"


def test_as_many_centroids_as_keys_of_one_length_are_the_keys() -> None:
    keys = torch.nn.functional.normalize(torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    keys = torch.cat((keys, -keys), 1)
    found = cluster_keys(keys, keys, 1, 120)
    assert bool((found.sizes == 1).all())
    torch.testing.assert_close(found.centroids, keys)


@pytest.mark.parametrize(
    ("segments", "centroids", "iterations", "message"),
    [
        (1, 101, 10, r"centroids: got 101 in 1 segments, allowed: at most 100, one for every key in segments of 100"),
        (30, 120, 10, r"centroids: got 120 in 30 segments, allowed: at most 90"),
        (200, 200, 10, r"centroids: got 200 in 200 segments, allowed: at most 0"),
        (3, 16, 10, r"centroids, segments: got 16, 3, allowed: both >= 1, centroids a multiple of segments"),
        (0, 16, 10, r"centroids, segments: got 16, 0"),
        (1, 0, 10, r"centroids, segments: got 0, 1"),
        (1, 16, 0, r"iterations: got 0, allowed: >= 1"),
    ],
)
def test_bad_counts(segments: int, centroids: int, iterations: int, message: str) -> None:
    keys, values = bundles(1, 100, 8)
    with pytest.raises(ValueError, match=message):
        cluster_keys(keys, values, segments, centroids, iterations)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (torch.zeros(2, 9, 4), torch.zeros(2, 8, 4)),
        (torch.zeros(9, 4), torch.zeros(9, 4)),
        (torch.zeros(1, 9, 4, dtype=torch.int32), torch.zeros(1, 9, 4)),
    ],
)
def test_bad_states(keys: torch.Tensor, values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"keys, values: got torch\.\w+ \[.*allowed: floating, both \[R, N, D\]"):
        cluster_keys(keys, values, 1, 4)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (4 << 10, (1, 256, 5, 59)),
        (8 << 10, (1, 512, 9, 119)),
        (16 << 10, (2, 1024, 18, 238)),
        (32 << 10, (4, 2048, 37, 475)),
        (64 << 10, (8, 4096, 74, 950)),
        (128 << 10, (16, 8192, 147, 1901)),
        (1 << 20, (128, 65536, 1180, 15204)),
        (120_000, (15, 7440, 134, 1726)),
        (1024, (1, 64, 1, 15)),
    ],
)
def test_counts_of_the_paper(length: int, expected: tuple[int, ...]) -> None:
    assert ClusterCounts.for_length(length, 0.018, 0.232) == ClusterCounts(*expected)


@pytest.mark.parametrize(
    ("budgets", "expected"), [((0, 0), (1, 0)), ((1, 1), (512, 0)), ((0, 1), (1, 511)), ((0.5, 0.7), (256, 256))]
)
def test_what_is_retrieved_is_not_estimated(budgets: tuple[float, float], expected: tuple[int, int]) -> None:
    counts = ClusterCounts.for_length(8192, *budgets)
    assert (counts.retrieved, counts.estimated) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.1, 0.1), "length: got 0, allowed: >= 1"),
        ((100, -0.1, 0.1), "retrieval_budget: got -0.1, allowed: 0 to 1"),
        ((100, 0.1, 1.5), "estimation_budget: got 1.5, allowed: 0 to 1"),
        ((100, float("nan"), 0.1), "retrieval_budget: got nan, allowed: 0 to 1"),
    ],
)
def test_bad_length_or_budget(arguments: tuple[int, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterCounts.for_length(*arguments)


def kmeans_by_queries(keys: np.ndarray, moment: np.ndarray, clusters: int, iterations: int) -> np.ndarray:
    """The assignment of k-means under x^T M x in float64, its first centroids evenly spaced keys: [n]."""
    centroids = keys[[int((i + 0.5) * len(keys) / clusters) for i in range(clusters)]]
    for _ in range(iterations):
        gaps = keys[:, None] - centroids
        nearest = np.einsum("ncd,de,nce->nc", gaps, moment, gaps).argmin(1)
        means = [keys[nearest == c].mean(0) if (nearest == c).any() else centroids[c] for c in range(clusters)]
        centroids = np.stack(means)
    return nearest


def test_clusters_by_queries_are_plain_k_means_under_their_metric() -> None:
    rng = np.random.default_rng(0)
    keys, queries = rng.normal(size=(300, 16)) + 2, rng.normal(size=(50, 16)) * np.linspace(0.1, 3, 16)
    moment = queries.T @ queries / 50
    keys_, moment_ = torch.from_numpy(keys).float()[None], torch.from_numpy(moment).float()[None]
    made = cluster_keys(keys_, keys_, 1, 20, 6, moment_)
    expected = kmeans_by_queries(keys, moment, 20, 6)
    assert (made.assignment[0].numpy() == expected).mean() > 0.99
    filled = made.sizes[0] > 0
    means = torch.stack([keys_[0, made.assignment[0] == c].mean(0) for c in filled.nonzero().flatten().tolist()])
    torch.testing.assert_close(made.centroids[0, filled], means)


def test_logits_vary_less_inside_clusters_by_queries() -> None:
    torch.manual_seed(0)
    keys, queries = torch.randn(1, 2000, 32), torch.randn(400, 32) * torch.linspace(0.05, 2, 32)
    moment = (queries.T @ queries / len(queries))[None]
    spread = {}
    for name, metric in (("spherical", None), ("queries", moment)):
        made = cluster_keys(keys, keys, 1, 100, 6, metric)
        gaps = keys[0] - made.centroids[0, made.assignment[0].long()]
        spread[name] = float((gaps @ queries.T).square().mean())
    assert spread["queries"] < 0.8 * spread["spherical"]
