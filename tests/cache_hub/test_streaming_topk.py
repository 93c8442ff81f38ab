"""The two-pass top-k on a GPU against a plain sort."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "m", "first", "dim", "k"),
    [
        (1, 1, 0, 64, 2),
        (63, 70, -5, 64, 8),
        (257, 131, 100, 128, 32),
        (1009, 200, 800, 80, 5),
        (1500, 64, 1300, 64, 40),
    ],
)
def test_lists_are_the_k_best_that_a_query_sees(
    device: str, dtype: torch.dtype, n: int, m: int, first: int, dim: int, k: int
) -> None:
    from cache_hub.index.streaming_topk import streaming_topk

    torch.manual_seed(n)
    # Whole numbers: sums are exact in any order; most scores differ.
    keys = torch.randint(-9, 10, (n, dim)).to(device, dtype)
    queries = torch.randint(-9, 10, (m, dim)).to(device, dtype)
    visible = (torch.arange(m) + first + 1).clamp(0, n).int()
    ids = streaming_topk(keys, queries, visible.to(device), k).cpu()
    scores = (queries.float() @ keys.float().T).cpu()
    scores.masked_fill_(torch.arange(n) >= visible[:, None], float("-inf"))
    expected = torch.nn.functional.pad(scores, (0, max(k - n, 0)), value=float("-inf")).topk(k).values
    assert torch.equal(ids < 0, expected == float("-inf"))
    found = scores.gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, float("-inf"))
    assert torch.equal(found, expected)
    assert all(len(set(row)) == len(row) for row in ids.tolist() if -1 not in row)
