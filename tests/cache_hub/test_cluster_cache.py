"""The cluster cache, on CPU tensors: what is hit, what is evicted, and that the output does not depend on it."""

from __future__ import annotations

import pytest
import torch
from cache_run import Run, relative_error

from attn_hub import weighted_decode_attention
from cache_hub import WaveIndexCache
from cache_hub.cluster_cache import PAGE, ClusterCache
from cache_hub.clusters import ClusterCounts, Clusters, cluster_keys
from cache_hub.wave_index import WaveIndex


class Cached(WaveIndexCache):
    """Makes the caches without a GPU too; 64 generated tokens at a time become clusters."""

    update_tokens = 64

    def prepare_cache(self) -> None:
        self._caches = [ClusterCache(index, self.cache_pages(index)) for index in self._indexes]


class Uncached(WaveIndexCache):
    update_tokens = 64


def index_of(sizes: list[int], heads: int = 1, dim: int = 8) -> WaveIndex:
    """One sequence whose clusters have these sizes in every kv head; row i holds the value i."""
    index = WaveIndex(1, heads, sum(sizes), dim, torch.float32, torch.device("cpu"))
    assignment = torch.repeat_interleave(torch.tensor(sizes)).int().expand(heads, -1)
    means, counts = torch.zeros(heads, len(sizes), dim), torch.tensor(sizes).int().expand(heads, -1)
    states = torch.arange(sum(sizes)).float()[None, None, :, None].expand(1, heads, -1, dim)
    index.add(
        slice(0, 1), states, states, Clusters(means, counts, means, assignment), ClusterCounts(1, len(sizes), 1, 0)
    )
    return index


def read(cache: ClusterCache, clusters: list[int]) -> tuple[list[float], list[float]]:
    """Rows that one step reads from the pages and from the store, by their values."""
    parts, missed = cache.parts(torch.tensor(clusters)[None, None])
    rows = [[part.keys[0, 0, row, 0].item() for row in part.ids[0, 0] if row >= 0] for part in parts]
    assert missed == len(rows[1])
    cache.admit()
    return rows[0], rows[1]


def test_what_was_read_once_is_read_from_the_pages_until_newer_clusters_take_them() -> None:
    cache = ClusterCache(index_of([3, 8, 9, 1, 0, 20]), pages=4)
    a, b, c = ([0, 1, 2], list(range(3, 11)), list(range(11, 20)))
    assert read(cache, [0, 1]) == ([], a + b)
    assert read(cache, [1, 0]) == (b + a, [])
    assert read(cache, [2, 4]) == ([], c)  # two pages: all four are taken now
    assert read(cache, [0]) == (a, [])
    assert read(cache, [3]) == ([], [20])  # in the place of cluster 1, which was not used for longest
    assert read(cache, [0, 2, 3]) == (a + c + [20], [])
    assert read(cache, [1]) == ([], b)


def test_pages_read_in_a_step_are_not_evicted_by_it() -> None:
    cache = ClusterCache(index_of([8, 8, 8, 8]), pages=2)
    read(cache, [0])
    assert len(read(cache, [0, 1, 2, 3])[0]) == 8
    assert [len(rows) for rows in read(cache, [0, 1, 2])] == [16, 8]


def test_random_steps_follow_a_plain_list_of_slots() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 30, (40,), generator=generator).tolist()
    cache = ClusterCache(index_of(sizes, heads=3), pages=25)
    held: list[list[tuple[int, int] | None]] = [[None] * 25 for _ in range(3)]
    used = [[0] * 25 for _ in range(3)]
    for step in range(1, 60):
        chosen = torch.stack([torch.randperm(40, generator=generator)[:6] for _ in range(3)])
        parts, missed = cache.parts(chosen[None])
        expected = 0
        for head in range(3):
            wanted = [(c, j) for c in chosen[head].tolist() for j in range(-(-sizes[c] // PAGE))]
            lengths = [min(PAGE, sizes[c] - PAGE * j) for c, j in wanted]
            missing = [page for page in wanted if page not in held[head]]
            hits = sum(length for page, length in zip(wanted, lengths, strict=True) if page not in missing)
            assert int((parts[0].ids[0, head] >= 0).sum()) == hits
            expected += sum(lengths) - hits
            for page in set(wanted) - set(missing):
                used[head][held[head].index(page)] = step
            oldest = sorted((slot for slot in range(25) if used[head][slot] < step), key=used[head].__getitem__)
            for slot, page in zip(oldest, missing, strict=False):
                held[head][slot], used[head][slot] = page, step
        assert missed == expected
        cache.admit()


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_output_does_not_depend_on_the_cache_and_only_misses_are_moved(ratio: float) -> None:
    run = Run([700, 500], steps=70)
    # Queries that change little from step to step, so that there is something to hit.
    run.q[:, :, 700:] = run.q[:, :, 700:701] + 0.3 * run.q[:, :, 700:]
    outs, caches = [], []
    for kind in (Cached, Uncached):
        cache = kind(retrieval_budget=0.2, cache_ratio=ratio, **run.common())
        run.prefill(cache)
        outs.append(run.decode(cache))
        caches.append(cache)
    assert relative_error(*outs) < 1e-5
    with_pages, without = caches
    assert with_pages.stats.attended == without.stats.attended
    assert with_pages.stats.bytes_moved < 0.7 * without.stats.bytes_moved
    assert with_pages.index_bytes > without.index_bytes


def test_a_cache_of_all_pages_moves_every_member_once() -> None:
    keys, values = torch.randn(2, 1, 2, 300, 16, generator=torch.Generator().manual_seed(0))
    index = WaveIndex(1, 2, 300, 16, torch.float32, torch.device("cpu"))
    index.add(slice(0, 1), keys, values, cluster_keys(keys[0], values[0], 1, 24), ClusterCounts(1, 24, 24, 0))
    cache, query = ClusterCache(index, 100), torch.randn(1, 1, 4, 16, generator=torch.Generator().manual_seed(1))
    everything = torch.arange(24).expand(1, 2, -1)
    expected = weighted_decode_attention(query, [index.retrieved_part(index.rows_of(everything))])
    for missed in (600, 0, 0):
        parts, moved = cache.parts(everything)
        assert moved == missed
        torch.testing.assert_close(weighted_decode_attention(query, parts), expected)
        cache.admit()


def test_there_is_no_cache_without_a_gpu() -> None:
    run = Run([1200], steps=1)
    cache = WaveIndexCache(cache_ratio=0.5, **run.common())
    run.prefill(cache)
    assert cache._caches == [None, None]


@pytest.mark.parametrize("options", [{"cache_ratio": -0.1}, {"cache_ratio": 1.1}, {"pages_per_cluster": 0}])
def test_bad_options_are_answered_with_what_is_allowed(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"cache_ratio, pages_per_cluster: got .*, allowed: 0 to 1, >= 1"):
        WaveIndexCache(**{**Run([150]).common(), **options})
