"""The implementations of weighted decode attention that every property is checked on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from attention_cases import KERNELS
from torch import Tensor

from attn_hub import WeightedPart
from attn_hub.reference import reference_weighted_decode_attention


@dataclass
class Implementation:
    """A weighted decode attention and the device of its tensors."""

    attend: Callable[..., Tensor]
    device: str

    def __call__(self, query: Tensor, parts: Sequence[WeightedPart], scale: float | None = None) -> Tensor:
        return self.attend(query, parts, scale)


def _implementation(name: str) -> Implementation:
    if name == "reference":
        return Implementation(reference_weighted_decode_attention, "cpu")
    pytest.importorskip("triton")
    from attn_hub.kernels.weighted_decode import triton_weighted_decode_attention

    return Implementation(triton_weighted_decode_attention, "cuda" if name == "compiled" else "cpu")


@pytest.fixture(params=[KERNELS])
def kernels(request: pytest.FixtureRequest) -> Implementation:
    """The Triton kernels: compiled where there is a GPU, else interpreted on the CPU."""
    return _implementation(request.param)


@pytest.fixture(params=["reference", KERNELS])
def attention(request: pytest.FixtureRequest) -> Implementation:
    """The reference, and the kernels."""
    return _implementation(request.param)
