"""Generated tokens that leave the static zone for index, store and tail, against attention over the same tokens."""

import pytest
import torch
from cache_run import LAYERS, Run, relative_error

from cache_hub import FlatCache, make_cache
from cache_hub.indexed_sequences import LatestQueries
from cache_hub.retrieval_cache import TokenIndexCache
from cache_hub.static_zone import StaticZone
from cache_hub.tail import CentroidTail
from config import ESTIMATIONS, RetroInferConfig
from config.schema import ESTIMATING

BATCH, STEPS = 7, 40


def settings(n: int, **changes: object) -> RetroInferConfig:
    """Settings under which every strategy finds all of n keys, but for the changes to the graph's section."""
    graph = {"top_k": n, "ef_search": n, "key_degree": 8, "key_links": 4, "index_dtype": "auto", "insert_batch": BATCH}
    return RetroInferConfig(
        attention_aware_graph={**graph, **changes},
        ivf={"n_probe": n},
        hnsw={"m": n, "ef_construction": n, "ef_search": n},
        static_pattern_end=16,
    )


def moved(layer: int, step: int, batch: int = BATCH) -> int:
    """Generated tokens that have left a layer's static zone when step `step` attends."""
    return max((step - 1 - layer * batch // LAYERS) // batch * batch, 0)


@pytest.mark.parametrize("estimation", ESTIMATIONS)
@pytest.mark.parametrize("strategy", ESTIMATING)
@pytest.mark.parametrize("lengths", [[100], [300, 131], [257, 20, 200]])
def test_retrieving_everything_equals_full_attention(strategy: str, estimation: str, lengths: list[int]) -> None:
    """A prompt of 20 tokens stays static, beside others whose tokens move."""
    run = Run(lengths, steps=STEPS)
    cache = make_cache(strategy, settings(400, estimation=estimation), **run.common())
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5
    assert isinstance(cache, TokenIndexCache)
    for layer, groups in enumerate(cache._groups):
        lengths_indexed = [group.stop - group.first for group in groups]
        assert lengths_indexed == [n - 20 + moved(layer, STEPS + 1) for n in lengths if n > 20]
    assert cache.stats.seconds["insert"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("estimation", ESTIMATIONS)
@pytest.mark.parametrize("strategy", ESTIMATING)
def test_beside_a_gpu_retrieving_everything_equals_full_attention(strategy: str, estimation: str) -> None:
    run = Run([300, 131], steps=STEPS, device="cuda:0")
    cache = make_cache(strategy, settings(400, estimation=estimation), **run.common())
    run.prefill(cache)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-4


def test_sequences_prefilled_together_move_together() -> None:
    run = Run([150, 150, 150], steps=STEPS)
    cache = make_cache("attention_aware_graph", settings(400), **run.common(prefill_bsz=3))
    run.prefill(cache, together=3)
    assert relative_error(run.decode(cache), run.full_attention()) < 1e-5


@pytest.mark.parametrize("estimation", ESTIMATIONS)
def test_every_token_is_attended_or_estimated_once(estimation: str) -> None:
    """By the weights of all parts: what softmax_lift draws stands for others, what none drops is missing."""
    run = Run([200], steps=STEPS, group=1)
    cache = FlatCache(static_pattern_end=16, top_k=9, estimation=estimation, insert_batch=BATCH, **run.common())
    run.prefill(cache)
    run.decode(cache)
    static = [4 + 16 + step - moved(layer, step) for step in range(1, STEPS + 1) for layer in range(LAYERS)]
    contexts = sum(200 + step for step in range(1, STEPS + 1))
    assert cache.stats.attended == run.kv_heads * sum(count + 9 for count in static)
    assert cache.stats.attended_of == LAYERS * run.kv_heads * contexts
    assert cache.stats.scored == run.kv_heads * sum(
        200 - 20 + moved(layer, step) for step in range(1, STEPS + 1) for layer in range(LAYERS)
    )
    if estimation == "centroid":
        for layer, tail in enumerate(cache._tails):
            assert tail.sizes.sum(2).tolist() == [[180 + moved(layer, STEPS + 1)] * run.kv_heads]


def test_a_tail_that_grew_is_the_clusters_of_all_batches() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 130, 64), torch.randn(2, 2, 130, 64)
    moment = torch.eye(64).expand(2, 64, 64)
    tail = CentroidTail(2, 2, 64, torch.float32, torch.device("cpu"))
    # The second sequence has fewer tokens.
    tail.add(slice(0, 1), keys[:1, :, :90], values[:1, :, :90], moment)
    tail.add(slice(1, 2), keys[1:, :, :33], values[1:, :, :33], moment)
    tail.add(slice(0, 1), keys[:1, :, 90:], values[:1, :, 90:], moment)
    tail.add(slice(1, 2), keys[1:, :, 33:44], values[1:, :, 33:44], moment)
    assert tail.clusters == [13, 4]
    for b, tokens in ((0, 130), (1, 44)):
        for head in range(2):
            assignment = tail.assignment[b, head, :tokens].long()
            assert torch.equal(tail.sizes[b, head], assignment.bincount(minlength=13).float())
            for cluster in assignment.unique().tolist():
                members = assignment == cluster
                own = (tail.centroids[b, head, cluster], tail.value_means[b, head, cluster])
                for table, mean in zip((keys, values), own, strict=True):
                    torch.testing.assert_close(mean, table[b, head, :tokens][members].mean(0))
    first = tail.assignment[0, 0]
    assert first[:90].max() < 9 <= first[90:].min(), "new tokens have clusters of their own"
    assert torch.equal(tail.log_sizes, tail.sizes.log())


def test_what_waits_is_never_more_than_two_batches() -> None:
    run = Run([200], steps=STEPS)
    cache = FlatCache(static_pattern_end=16, insert_batch=BATCH, **run.common())
    run.prefill(cache)
    run.decode(cache)
    for layer in range(LAYERS):
        assert cache._zones[layer].keys.shape[2] == 4 + 16 + 2 * BATCH
        assert cache._keys[layer].shape[2] == 200 + STEPS // BATCH * BATCH - 16


def test_without_batches_nothing_moves() -> None:
    outs = []
    for batch in (0, STEPS + 1):
        run = Run([200], steps=STEPS)
        cache = FlatCache(static_pattern_end=16, top_k=9, insert_batch=batch, **run.common())
        run.prefill(cache)
        outs.append(run.decode(cache))
        assert cache._keys[0].shape[2] == 200
        cache.rewind()
    assert torch.equal(*outs)


def test_a_cache_that_grew_is_not_rewound() -> None:
    run = Run([200], steps=STEPS)
    cache = FlatCache(static_pattern_end=16, insert_batch=BATCH, **run.common())
    run.prefill(cache)
    run.decode(cache)
    with pytest.raises(
        ValueError, match=r"rewind: 35 generated tokens are indexed, allowed: none, as with insert_batch"
    ):
        cache.rewind()


@pytest.mark.parametrize("strategy", ["flat", "attention_aware_graph"])
def test_diagnosis_knows_the_tokens_that_moved(strategy: str) -> None:
    run = Run([150, 120], steps=STEPS)
    cache = make_cache(strategy, settings(400, top_k=10), **run.common(diagnose=True))
    run.prefill(cache)
    run.decode(cache)
    agreement = cache.stats.agreement
    assert agreement is not None
    assert agreement.mean(agreement.recall).min() > 0.999
    torch.testing.assert_close(agreement.mass, agreement.exact_mass)


@pytest.mark.parametrize(("steps", "turn"), [(1, 0), (5, 0), (5, 3)])
def test_latest_queries_come_oldest_first_when_it_is_their_turn(steps: int, turn: int) -> None:
    latest = LatestQueries(steps, turn)
    for step in range(1, 23):
        got = latest.put(step, torch.full((2, 3, 4), float(step)))
        if step <= turn or (step - turn) % steps:
            assert got is None
        else:
            assert got is not None
            assert got[:, 0, 0].tolist() == list(range(step - steps + 1, step + 1))


def test_taking_tokens_out_of_a_zone_closes_the_gap() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(3, 2, 20, 8), torch.randn(3, 2, 20, 8)
    zone = StaticZone(3, 2, 20, 8, torch.float32, torch.device("cpu"))
    zone.put(slice(0, 2), keys[:2], values[:2])
    zone.put(slice(2, 3), keys[2:, :, :7], values[2:, :, :7])
    taken = zone.take(slice(0, 2), 4, 11)
    assert zone.counts == [9, 9, 7]
    assert zone.part().lengths.tolist() == [[9, 9], [9, 9], [7, 7]]
    for table, got, source in zip((zone.keys, zone.values), taken, (keys, values), strict=True):
        assert torch.equal(got, source[:2, :, 4:15])
        assert torch.equal(table[:2, :, :9], torch.cat((source[:2, :, :4], source[:2, :, 15:]), 2))
        assert torch.equal(table[2:, :, :7], source[2:, :, :7])


def test_a_negative_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"insert_batch: got -1, allowed: >= 0"):
        FlatCache(insert_batch=-1, **Run([50]).common())
