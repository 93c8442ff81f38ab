"""Random attention, and what its walkers are expected to visit, by a dense inverse in float64."""

import numpy as np
import torch
from torch import Tensor


def attention(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Tensor:
    """Causal softmax [*shape, n] of random logits; shape ends with n."""
    n = shape[-1]
    logits = spread * torch.randn(*shape, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1).to(dtype)


def fundamental(transitions: Tensor, absorbing: Tensor) -> Tensor:
    """(I - Q)^-1 [..., n, n] of transitions [..., n, n] where absorbing tokens [..., n] are not left."""
    leaving = transitions.double().masked_fill(absorbing[..., None], 0)
    # By numpy: torch factors a batch in threads, in which MKL has been seen to wait for ever.
    return torch.from_numpy(np.linalg.inv(np.eye(transitions.shape[-1]) - leaving.numpy()))


def expected_visits(transitions: Tensor, absorbing: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [..., n] of one walk's visits from a distribution [..., n]."""
    visits = fundamental(transitions, absorbing)
    mean = (start.double()[..., None, :] @ visits)[..., 0, :]
    return mean, mean * (2 * visits.diagonal(dim1=-2, dim2=-1) - 1) - mean**2


def sinks(n: int, count: int) -> Tensor:
    return torch.arange(n) < count


def one_hot(n: int, token: int) -> Tensor:
    return (torch.arange(n) == token).double()
