"""The kernels of clustering on a GPU against plain evaluations, and the clusters made with them against a CPU's."""

import pytest
import torch

SHAPES = [(1, 1, 1, 64), (2, 63, 3, 64), (3, 131, 131, 80), (2, 257, 200, 128), (1, 97, 66, 129), (2, 40, 33, 256)]


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("units", "count", "clusters", "dim"), SHAPES)
def test_the_nearest_centroid_is_the_plain_one(
    device: str, units: int, count: int, clusters: int, dim: int, offset: bool
) -> None:
    """Whole numbers, whose products are exact, with ties; points lie in a wider table, as those that end with a 1."""
    from cache_hub.cluster_kernels import nearest_centroid

    torch.manual_seed(count)
    wide = torch.randint(-3, 4, (units, count, dim + 1)).float()
    points, centroids = wide[..., :-1], torch.randint(-3, 4, (units, clusters, dim)).float()
    offsets = torch.randint(-20, 21, (units, clusters)) / 2 if offset else None
    scores = points @ centroids.transpose(1, 2) + (0 if offsets is None else offsets[:, None])
    expected = (scores == scores.amax(2, keepdim=True)).int().argmax(2)
    there = None if offsets is None else offsets.to(device)
    found = nearest_centroid(wide.to(device)[..., :-1], centroids.to(device), there)
    assert found.dtype == torch.int32
    assert torch.equal(found.cpu().long(), expected)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rounding_picks_centroids_that_are_nearly_the_best(device: str, size: float) -> None:
    """One point is a thousand times as long as the others."""
    from cache_hub.cluster_kernels import nearest_centroid

    torch.manual_seed(0)
    points, centroids = size * torch.randn(1, 300, 64), size * torch.randn(1, 50, 64)
    points[0, 7] *= 1000
    offsets = -0.5 * centroids.square().sum(2)
    found = nearest_centroid(points.to(device), centroids.to(device), offsets.to(device)).cpu().long()
    scores = points @ centroids.transpose(1, 2) + offsets[:, None]
    lost = scores.amax(2) - scores.gather(2, found[..., None])[..., 0]
    lengths = points.norm(dim=2) * centroids.norm(dim=2).amax()
    assert bool((lost <= 2**-10 * lengths).all())
    assert (found == scores.argmax(2)).float().mean() > 0.98


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_points_go_to_the_first_of_equal_centroids(device: str, value: float) -> None:
    from cache_hub.cluster_kernels import nearest_centroid

    points, centroids = torch.full((1, 40, 64), value), torch.full((1, 100, 64), value)
    assert not bool(nearest_centroid(points.to(device), centroids.to(device), torch.zeros(1, 100).to(device)).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("units", "count", "clusters", "dim"), SHAPES)
def test_sums_are_those_of_the_members(
    device: str, units: int, count: int, clusters: int, dim: int, dtype: torch.dtype
) -> None:
    """Tokens lie as a model's states do, heads between them; some clusters are empty, one has a third of all."""
    from cache_hub.cluster_kernels import by_cluster, sum_members

    torch.manual_seed(clusters)
    points = torch.randint(-9, 10, (count, units, dim)).to(dtype).transpose(0, 1)
    assignment = torch.randint(0, clusters, (units, count), dtype=torch.int32)
    assignment[:, ::3] = 0
    member = (assignment[..., None] == torch.arange(clusters)).float()
    order, begin = by_cluster(assignment.to(device), clusters)
    assert torch.equal(begin.diff().cpu().view(units, clusters), member.sum(1).long())
    sums = sum_members(points.to(device), order, begin)
    assert sums.dtype == torch.float32
    assert torch.equal(sums.cpu(), member.transpose(1, 2) @ points.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("by_queries", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clusters_made_on_a_gpu_are_as_good_as_a_cpus(dtype: torch.dtype, by_queries: bool) -> None:
    """Rounding sends a few keys elsewhere, after which rounds differ: the spread inside the clusters must not."""
    from cache_hub.clusters import cluster_keys

    torch.manual_seed(0)
    keys, values = (torch.randn(3000, 2, 64).to(dtype).transpose(0, 1) for _ in range(2))
    queries = torch.randn(2, 200, 64) * torch.linspace(0.1, 3, 64)
    moment = queries.transpose(1, 2) @ queries / 200 if by_queries else None
    spread = {}
    for device in ("cpu", "cuda"):
        given = None if moment is None else moment.to(device)
        made = cluster_keys(keys.to(device), values.to(device), 3, 300, 5, given)
        assert made.centroids.device.type == device
        sizes, assignment = made.sizes.cpu(), made.assignment.cpu().long()
        assert bool((sizes.sum(1) == 3000).all())
        member = torch.nn.functional.one_hot(assignment, 300).double()
        assert torch.equal(member.sum(1).int(), sizes)
        sums = member.transpose(1, 2) @ values.double()
        torch.testing.assert_close(made.value_sums.cpu().double(), sums, atol=1e-4, rtol=1e-4)
        centroids = made.centroids.cpu()
        means = member.transpose(1, 2) @ keys.double() / sizes.clamp(min=1)[..., None]
        torch.testing.assert_close(centroids[sizes > 0].double(), means[sizes > 0], atol=1e-4, rtol=1e-4)
        gaps = keys.float() - centroids.gather(1, assignment[..., None].expand(-1, -1, 64))
        spread[device] = float((gaps @ queries.transpose(1, 2)).square().mean())
    assert spread["cuda"] == pytest.approx(spread["cpu"], rel=0.02)
