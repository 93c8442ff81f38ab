"""The two-pass top-k on a GPU against a plain sort."""

import pytest
import torch


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "m", "first", "dim", "k"),
    [
        (1, 1, 0, 64, 2),
        (63, 33, -5, 64, 8),
        (257, 37, 100, 128, 32),
        (1009, 35, 800, 80, 5),
        (1500, 17, 1300, 64, 40),
    ],
)
def test_lists_are_the_k_best_that_a_query_sees(
    device: str, dtype: torch.dtype, beside: bool, n: int, m: int, first: int, dim: int, k: int
) -> None:
    from cache_hub.index.streaming_topk import streaming_topk

    torch.manual_seed(n)
    # Whole numbers: sums are exact in any order; most scores differ.
    keys = torch.randint(-9, 10, (n, dim)).to(device, dtype)
    queries = torch.randint(-9, 10, (m, dim)).to(device, dtype)
    visible = (torch.arange(m) + first + 1).clamp(0, n).int()
    more = torch.randint(-99, 100, (n,)).float(), torch.randint(1, 3, (m,)).float()
    there = (more[0].to(device), more[1].to(device)) if beside else None
    ids = streaming_topk(keys, queries, visible.to(device), k, there).cpu()
    scores = (queries.float() @ keys.float().T).cpu()
    if beside:
        scores += more[1][:, None] * more[0]
    scores.masked_fill_(torch.arange(n) >= visible[:, None], float("-inf"))
    expected = torch.nn.functional.pad(scores, (0, max(k - n, 0)), value=float("-inf")).topk(k).values
    assert torch.equal(ids < 0, expected == float("-inf"))
    found = scores.gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, float("-inf"))
    assert torch.equal(found, expected)
    assert all(len(set(row)) == len(row) for row in ids.tolist() if -1 not in row)


@pytest.mark.parametrize(("width", "k"), [(1, 1), (63, 63), (100, 7), (1024, 32), (2050, 32)])
def test_largest_are_the_first_of_a_stable_sort(device: str, width: int, k: int) -> None:
    from cache_hub.index.chunk_topk import largest

    torch.manual_seed(width)
    # Ties within a row, both infinities, and rows of one value.
    scores = torch.randint(-40, 41, (9, width)) * 1e-3
    scores[:, ::5] = float("-inf")
    scores[3, ::7] = float("inf")
    scores[4:6] = torch.tensor([-1e30, float("-inf")])[:, None]
    expected = scores.argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values
    assert torch.equal(largest(scores.to(device), k).cpu().long(), expected)
