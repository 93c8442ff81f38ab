"""Where the Triton kernels of this room are tested."""

import os

import pytest
import torch

KERNEL = (
    pytest.param("cuda", marks=pytest.mark.gpu, id="compiled")
    if torch.cuda.is_available()
    else pytest.param(
        "cpu",
        marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by a process of its own"),
        id="interpreted",
    )
)


@pytest.fixture(params=[KERNEL])
def device(request: pytest.FixtureRequest) -> str:
    """The GPU, or the CPU for Triton's interpreter."""
    return str(request.param)
