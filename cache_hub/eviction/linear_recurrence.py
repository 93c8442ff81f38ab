"""First-order linear recurrences from the last token to the first, without a loop over tokens."""

from torch import Tensor
from torch.nn.functional import pad


def reversed_recurrence(log_factor: Tensor, inflow: Tensor) -> Tensor:
    """S [..., n] with S_j = exp(log_factor_j) S_{j+1} + inflow_j and S_n = 0, by two cumulative sums.

    S_j = sum over k >= j of inflow_k G_k / G_j with log G_k the sum of log_factor before k; G is taken relative to its
    largest. Exact to rounding where inflow >= 0, as nothing is subtracted then, and where G spans less than the range
    of the dtype (the callers' G spans n^gamma and the inverse of a clip, in float64).
    """
    log_g = pad(log_factor[..., :-1], (1, 0)).cumsum(-1)
    g = (log_g - log_g.amax(-1, keepdim=True)).exp()
    return (inflow * g).flip(-1).cumsum(-1).flip(-1) / g


def following(values: Tensor) -> Tensor:
    """values [..., n] moved one token to the front: column j holds that of j + 1, the last one 0."""
    return pad(values[..., 1:], (0, 1))
