"""Rows copied by id: torch and the kernel, padding, strides, dtypes, bad shapes."""

import pytest
import torch

from attn_hub import copy_rows


def case(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    # A store with other strides than a contiguous one, 37 entries for 50 rows.
    source = torch.randn(2, 60, 3, 24, generator=generator).to(dtype).transpose(1, 2)
    target = torch.zeros(2, 3, 50, 24, dtype=dtype)
    lists = [torch.stack([torch.randperm(n, generator=generator)[:37] for _ in range(6)]) for n in (60, 50)]
    source_ids, target_ids = (ids.view(2, 3, 37) for ids in lists)
    source_ids[0, 1, 5:9] = -1
    target_ids[1, 2, 7:20] = -1
    return tuple(tensor.to(device) for tensor in (source, target, source_ids.int(), target_ids))


def check(source, target, source_ids, target_ids) -> None:
    expected = target.clone()
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(37)):
        row, place = source_ids[b, h, t], target_ids[b, h, t]
        if row >= 0 and place >= 0:
            expected[b, h, place] = source[b, h, row]
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_copied(dtype):
    tensors = case(dtype, "cpu")
    expected = check(*tensors)
    copy_rows(*tensors)
    assert torch.equal(tensors[1], expected)
    assert tensors[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_copied_by_the_kernel(kernels, dtype):
    from attn_hub.kernels.copy_rows import triton_copy_rows

    tensors = case(dtype, kernels.device)
    expected = check(*tensors)
    triton_copy_rows(*tensors)
    assert torch.equal(tensors[1], expected)
    triton_copy_rows(*tensors[:2], *(ids[..., :0] for ids in tensors[2:]))
    assert torch.equal(tensors[1], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_are_copied_from_pinned_memory():
    source, *others = case(torch.bfloat16, "cpu")
    expected = check(source, *others)
    target, *ids = (tensor.cuda() for tensor in others)
    copy_rows(source.contiguous().pin_memory(), target, *ids)
    assert torch.equal(target.cpu(), expected)


@pytest.mark.parametrize("change", [{0: (2, 3, 9, 25)}, {1: (1, 3, 9, 24)}, {2: (2, 3, 36)}])
def test_what_does_not_fit_is_refused(change):
    tensors = list(case(torch.float32, "cpu"))
    for at, shape in change.items():
        tensors[at] = tensors[at].new_zeros(shape)
    with pytest.raises(ValueError, match=r"source torch.float32 \[2, 3, .*allowed: one dtype"):
        copy_rows(*tensors)
