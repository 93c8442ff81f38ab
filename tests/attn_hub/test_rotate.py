"""The rotary kernel gives bit for bit what torch's operations give."""

import pytest
import torch
from attention_cases import KERNELS

from attn_hub import rotate


@pytest.mark.parametrize("way", [KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "length", "heads", "head_dim"), [(1, 1, 1, 64), (2, 7, 3, 80), (1, 63, 40, 128)])
def test_every_bit_is_torchs(way, dtype, batch, length, heads, head_dim):
    pytest.importorskip("triton")
    from attn_hub.kernels.rotate import triton_rotate

    device = "cuda" if way == "compiled" else "cpu"
    torch.manual_seed(0)
    states = torch.randn(batch, length, heads + 2, head_dim).to(dtype)[:, :, 1:-1]
    angles = 9 * torch.rand(1 if length == 7 else batch, length, 1, head_dim // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    with torch.enable_grad():
        expected = rotate(states, cos, sin)
    actual = triton_rotate(*(tensor.to(device) for tensor in (states, cos, sin))).cpu()
    # Triton's interpreter does not round to bfloat16 as the hardware does.
    loose = 2**-5 if way == "interpreted" and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(actual, expected, atol=loose, rtol=loose)
