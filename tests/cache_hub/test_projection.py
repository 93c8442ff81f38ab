"""The projection for GPUs makes the graph that the native code makes."""

import pytest
import torch


@pytest.mark.parametrize(
    ("n", "group", "dim", "key_links"), [(1, 1, 64, 4), (2, 3, 64, 4), (63, 4, 128, 4), (97, 3, 80, 0), (120, 3, 64, 8)]
)
def test_links_equal_the_native_ones(device: str, n: int, group: int, dim: int, key_links: int) -> None:
    from cache_hub.index import make_index
    from cache_hub.index.knn import causal_knn, key_knn
    from cache_hub.index.projection import project

    torch.manual_seed(n)
    # Whole numbers: every order of summation gives the same product, and there are ties.
    keys = torch.randint(-2, 3, (2, n, dim)).float()
    queries = torch.randint(-2, 3, (2, group, n, dim)).float()
    options = {"key_degree": 8, "key_links": key_links, "q_knn": 12}
    native = make_index("attention_aware_graph", **options)
    native.build(keys, queries, torch.arange(n))
    by_query = causal_knn(keys, queries, torch.arange(n), 12)
    by_key = key_knn(keys, 8 if key_links else 0)
    links = project(*(tensor.to(device) for tensor in (keys, by_query, by_key)), 8, 8 - key_links).cpu()
    if native.repaired_keys == 0:
        assert torch.equal(links, native.adjacency)
    else:
        assert int((links != native.adjacency).any(2).sum()) <= native.repaired_keys


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_index_built_on_a_gpu_finds_what_the_one_built_on_a_cpu_finds() -> None:
    from cache_hub.index import make_index

    torch.manual_seed(0)
    keys, queries = torch.randn(2, 3000, 64), torch.randn(2, 3, 3000, 64)
    found = []
    for device in ("cpu", "cuda"):
        index = make_index("attention_aware_graph", index_dtype="auto")
        index.build(keys, queries.to(device), torch.arange(3000))
        found.append(index.search(queries[:, :, -1], 100).ids)
    same = (found[0][..., :, None] == found[1][..., None, :]).any(-1).float().mean()
    assert same > 0.99
