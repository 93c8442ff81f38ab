"""The native inner loops, every one that this CPU runs, against float64."""

import pytest
import torch
from torch import Tensor

from cache_hub.index import _native
from cache_hub.index.key_store import CompactKeys, as_key_store

KERNELS = _native.row_kernels()
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def scores_of(kernel: int, store: _native.KeyStore, query: Tensor, ids: Tensor) -> Tensor:
    out = torch.full((len(ids) + 1,), float("nan"))
    _native.score(store, kernel, query.data_ptr(), ids.data_ptr(), len(ids), out.data_ptr())
    assert out[-1].isnan(), "wrote past the end"
    return out[:-1]


def test_the_plain_loop_is_always_there_and_last() -> None:
    assert KERNELS[-1] == "plain"
    assert len(set(KERNELS)) == len(KERNELS)


@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 63, 64, 65, 96, 128, 200])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_rows_at_any_address(kernel: int, dtype: torch.dtype, dim: int) -> None:
    """Rows begin at odd elements and lie between nan (int8: 127), which counts as soon as a loop reads too far."""
    torch.manual_seed(dim)
    n = 37
    wide = torch.randn(1, n, dim + 6)
    held = (wide * 40).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else wide.to(dtype)
    rows = held[:, :, 1 : dim + 1]
    held[:, :, 0] = held[:, :, dim + 1 :] = 127 if dtype == torch.int8 else float("nan")
    query, ids = torch.randn(dim), torch.randint(n, (50,), dtype=torch.int32)
    if dtype == torch.int8:
        scales = torch.rand(1, n) + 0.5
        store = CompactKeys(rows, scales, torch.zeros(1, dim)).view(None)
    else:
        scales, store = torch.ones(1, n), as_key_store(rows)
    terms = rows[0].double() * scales[0, :, None].double() * query.double()
    found = scores_of(kernel, store, query, ids)
    error = (found - terms.sum(1)[ids.long()]).abs()
    assert bool((error <= 1e-6 * terms.abs().sum(1)[ids.long()]).all()), "within the rounding of float32 sums"


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_every_float16_is_read_right(kernel: int) -> None:
    """Subnormals and the largest too, a row for each."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    rows = every[every.isfinite()][None, :, None]
    ids = torch.arange(rows.shape[1], dtype=torch.int32)
    assert torch.equal(scores_of(kernel, as_key_store(rows), torch.ones(1), ids), rows[0, :, 0].float())


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_fewer_rows_than_are_asked_for_ahead(kernel: int, count: int) -> None:
    rows, ids = torch.randn(1, 6, 64), torch.arange(count, dtype=torch.int32)
    found = scores_of(kernel, as_key_store(rows), torch.ones(64), ids)
    torch.testing.assert_close(found, rows[0, :count].sum(1))


@pytest.mark.parametrize("dim", [16, 32, 63, 64, 96, 128, 160])
@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_bfloat16_queries_and_keys(kernel: int, dim: int) -> None:
    """Whose products may be made in pairs; the query beside it has one number more than bfloat16 holds."""
    torch.manual_seed(dim)
    rows, ids = torch.randn(1, 37, dim).bfloat16(), torch.randint(37, (50,), dtype=torch.int32)
    query = torch.randn(dim).bfloat16().float()
    almost = query.clone()
    almost[-1] = 0.1
    for asked in (query, almost):
        terms = rows[0].double() * asked.double()
        error = (scores_of(kernel, as_key_store(rows), asked, ids) - terms.sum(1)[ids.long()]).abs()
        assert bool((error <= 1e-6 * terms.abs().sum(1)[ids.long()]).all())
