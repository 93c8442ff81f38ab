"""The walkers' kernel against plain torch: not close but equal."""

import pytest
import torch
from walk_cases import attention

from cache_hub.eviction.landmarks import choose_landmarks, landmark_walks
from cache_hub.eviction.walk_reference import torch_walks
from cache_hub.eviction.walk_tables import WalkTables, transition_tables
from cache_hub.eviction.walks import batched_walk_simulation, causal_influence_walk, simulate_walks


def on(device: str, tables: WalkTables) -> WalkTables:
    return WalkTables(tables.cumulative.to(device), tables.starts.to(device), tables.absorbing.to(device))


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
@pytest.mark.parametrize(("n", "walkers", "start"), [(5, 1, "uniform"), (63, 129, "query"), (127, 300, "uniform")])
def test_the_kernel_walks_as_torch_does(device: str, n: int, walkers: int, start: str, seed: int) -> None:
    """Groups of 128 walkers with a rest, 2 x 3 heads, walker numbers that do not begin at 0."""
    from cache_hub.eviction.walk_kernels import triton_walks

    tables = transition_tables(attention(2, 3, n, seed=n), 2, start)
    expected = torch_walks(tables, walkers, 12, seed, first_walker=5, stream=3)
    found = triton_walks(on(device, tables), walkers, 12, seed, first_walker=5, stream=3)
    assert found.dtype == torch.int64
    assert torch.equal(found.cpu(), expected)


def test_the_kernel_knows_absorbing_tokens_and_sources(device: str) -> None:
    """Three sources per matrix, each with its own start and its own absorbing tokens; steps enough to end all walks."""
    from cache_hub.eviction.walk_kernels import triton_walks

    n, sources = 63, 3
    tables = transition_tables(attention(1, 2, n), 4, "query")
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, 5, (2 * sources, n), generator=generator).int().cumsum(1, dtype=torch.int32)
    absorbing = (torch.rand(2 * sources, n, generator=generator) < 0.1) | tables.absorbing[:1]
    several = WalkTables(tables.cumulative, starts, absorbing)
    expected = torch_walks(several, 131, 400, 7)
    assert bool(((expected * absorbing).sum(1) == 131).all())
    assert torch.equal(triton_walks(on(device, several), 131, 400, 7).cpu(), expected)


def test_a_token_of_no_width_is_not_drawn_at_either_end_of_the_random_words(device: str) -> None:
    """Rows with zeros first, last and between, many draws of each."""
    from cache_hub.eviction.walk_kernels import triton_walks

    rows = torch.zeros(1, 1, 8, 8)
    for token, reached in enumerate(([0], [1], [0, 1], [1], [1, 3], [2, 4], [3], [2, 5, 6])):
        rows[0, 0, token, reached] = 1 / len(reached)
    tables = transition_tables(rows, 1, "query", torch.tensor([False, True] + 6 * [False]))
    counts = triton_walks(on(device, tables), 1000, 50, 0).cpu()
    assert torch.equal(counts, torch_walks(tables, 1000, 50, 0))
    assert int(counts[0, :2].sum()) == 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_walks_on_a_gpu_are_those_of_a_cpu() -> None:
    """Made from float64 attention by the public functions: tables, draws and counts are whole numbers."""
    layers = [attention(2, 4, n, seed=n) for n in (257, 1031)]
    there = [layer.cuda() for layer in layers]
    for start in ("query", "uniform"):
        ours = batched_walk_simulation(there, 3001, None, 4, start, 11)
        assert all(
            torch.equal(gpu.cpu(), cpu)
            for gpu, cpu in zip(ours, batched_walk_simulation(layers, 3001, None, 4, start, 11), strict=True)
        )
    for backend in ("auto", "triton", "torch"):
        counts = simulate_walks(there[0], 999, 20, 4, backend=backend)
        assert torch.equal(counts.cpu(), simulate_walks(layers[0], 999, 20, 4))
    torch.testing.assert_close(causal_influence_walk(there[1]).cpu(), causal_influence_walk(layers[1]))
    landmarks = choose_landmarks(layers[1].sum(2), 16)
    assert torch.equal(choose_landmarks(layers[1].sum(2).cuda(), 16).cpu(), landmarks)
    for absorbing in (False, True):
        given = {"absorbing_landmarks": absorbing, "normalization": "reachable"}
        ours, theirs = (
            landmark_walks(there[1], landmarks.cuda(), **given),
            landmark_walks(layers[1], landmarks, **given),
        )
        torch.testing.assert_close(ours.cpu(), theirs)
