"""Exact chain scores from queries, keys and the log-sum-exp of the prefill: no n x n matrix, memory linear in n.

Source: reference section 8.5. Rows of attention are recomputed block by block from the last to the first, n^2 D
multiply-adds a query head, the score half of one more attention pass.

What is solved for is the probability y of ever coming to a token. Given that a walk leaves token i, it goes to j < i
with M_ij = gamma Q_ij / (1 - gamma Q_ii), whose rows sum to 1 at most, so that y = a + y M has a unit diagonal, sums
positive numbers only, and loses nothing where a token attends to hardly anything but itself; the visits are
y_j / (1 - gamma Q_jj).
"""

import math

import torch
from torch import Tensor

from .blocked_reference import own_logits, torch_log_sums, torch_solve
from .chain_inputs import raise_absorbing, start_distribution
from .checks import ROW_BYTES, check_gamma, check_sinks, check_temperature, choose_backend


@torch.no_grad()
def causal_log_sum_exp(
    query: Tensor, key: Tensor, temperature: float = 1.0, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Log-sum-exp of every row of causal logits, [B, H, n], float32 (float64 for float64).

    query [B, H, n, D], key [B, Hkv, n, D], H a multiple of Hkv; logits are scale / temperature times the products,
    scale D^-0.5 unless given. Raises ValueError for other shapes, a temperature not above 0 and an unknown backend.
    """
    return _log_sums(query, key, _scale(query, key, temperature, scale), backend)[0]


@torch.no_grad()
def blocked_chain_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None = None,
    start: str | tuple[str, ...] | Tensor = "query",
    sink_size: int = 4,
    gamma: float = 1.0,
    window: int = 64,
    temperature: float = 1.0,
    scale: float | None = None,
    probability: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`absorbing_chain_scores` of the causal attention of query and key, [B, H, n], float32 (float64 for float64).

    query [B, H, n, D], key [B, Hkv, n, D], H a multiple of Hkv: the query heads of a group share its keys. lse: natural
    log-sum-exp of the rows, [B, H, n], as flash attention returns it; without it, or at a temperature other than 1,
    which has a normaliser of its own, it is computed by one more pass. scale is D^-0.5 unless given. Several starts
    share a pass: the scores are then [B, H, k, n]. probability: of ever coming to a token, as `visit_probabilities`, in
    place of the visits. backend: "torch", "triton" on CUDA but for float64 and rows of more than 1,024 bytes, "auto":
    the latter where it can be.

    Raises ValueError as `absorbing_chain_scores`, and for shapes that do not fit, an unknown backend, and inputs with
    NaN or infinity. A token may attend to hardly anything but itself, as some of real models do: what leaves it,
    1 - Q_jj, comes from the pass that makes the lse. With an lse that is given it is a difference, and a chain counts
    as singular where that is below what rounding of the lse leaves of it.
    Nothing waits for the device before the end, but for the check of a start that is a tensor.
    """
    check_gamma(gamma)
    logit_scale = _scale(query, key, temperature, scale)
    chosen = choose_backend(backend, query, ROW_BYTES)
    n = query.shape[2]
    check_sinks(sink_size, n)
    dtype = torch.promote_types(query.dtype, torch.float32)
    rounding: Tensor | float = 0.0
    if lse is None or temperature != 1:
        lse, others = _log_sums(query, key, logit_scale, chosen)
        leaving = (others - lse).exp_().mul_(gamma).add_(1 - gamma)
        # With gamma 1 this is `others` itself, also where `leaving` underflows.
        shift = others if gamma == 1 else lse + leaving.log() - math.log(gamma)
    elif lse.shape == query.shape[:3]:
        lse = lse.to(dtype)
        leaving = 1 - gamma * (own_logits(query, key, logit_scale) - lse).exp_()
        shift = lse + (leaving / gamma).log()
        # A logit and its log-sum-exp, summed in different orders, differ by some roundings of their size.
        rounding = 8 * torch.finfo(dtype).eps * (1 + lse.abs())
    else:
        raise ValueError(f"lse: got shape {list(lse.shape)}, allowed: {list(query.shape[:3])}")
    leaving[..., :sink_size] = 1
    shift[..., :sink_size] = torch.inf
    starts = start if isinstance(start, tuple) else (start,)
    if not starts:
        raise ValueError("start: got none, allowed: at least one")
    masses = [start_distribution(each, n, sink_size, window, dtype, query.device) for each in starts]
    scores = torch.stack([mass.expand(query.shape[:3]) for mass in masses], 2)
    if chosen == "triton":
        from .blocked_kernels import triton_solve

        triton_solve(query, key, shift, scores, logit_scale, sink_size)
    else:
        torch_solve(query, key, shift, scores, logit_scale, sink_size)
    _check_solved(scores, leaving <= rounding)
    if not probability:
        scores /= leaving.unsqueeze(2)
    return scores if isinstance(start, tuple) else scores.squeeze(2)


def self_transitions(
    query: Tensor, key: Tensor, lse: Tensor, temperature: float = 1.0, scale: float | None = None
) -> Tensor:
    """Weight [B, H, n] of every token for itself, for `visit_probabilities`; arguments as `blocked_chain_scores`, lse
    being that of the logits over the temperature. Float32 (float64 for float64)."""
    return own_logits(query, key, _scale(query, key, temperature, scale)).sub_(lse).exp_()


def solve_bytes(heads: int, tokens: int, row_bytes: int) -> int:
    """What the kernels of `blocked_chain_scores` take for tokens of `heads` query heads, rows of so many bytes: the
    inverses of blocks of 128, or 64 where rows are longer than 256 bytes, and four float32 of a token and head."""
    return heads * tokens * ((512 if row_bytes <= 256 else 256) + 16)


def _log_sums(query: Tensor, key: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    if choose_backend(backend, query, ROW_BYTES) == "triton":
        from .blocked_kernels import triton_log_sums

        return triton_log_sums(query, key, scale)
    return torch_log_sums(query, key, scale)


def _scale(query: Tensor, key: Tensor, temperature: float, scale: float | None) -> float:
    """What products are multiplied by; checks the inputs that they are made of."""
    check_temperature(temperature)
    batch, heads, n, head_dim = query.shape
    if key.ndim != 4 or (key.shape[0], *key.shape[2:]) != (batch, n, head_dim) or heads % key.shape[1]:
        raise ValueError(
            f"key: got shape {list(key.shape)}, allowed: [{batch}, a divisor of {heads}, {n}, {head_dim}] "
            f"for query {list(query.shape)}"
        )
    if key.dtype != query.dtype or not query.is_floating_point():
        raise ValueError(f"dtypes: got query {query.dtype}, key {key.dtype}, allowed: one floating point type for both")
    return (head_dim**-0.5 if scale is None else scale) / temperature


def _check_solved(scores: Tensor, singular: Tensor) -> None:
    """Raises ValueError for a singular chain and for scores that are not finite; the one wait for the device."""
    if bool(singular.any() | ~scores.isfinite().all()):
        if bool(singular.any()):
            raise_absorbing(singular)
        raise ValueError("query, key or lse: got NaN or infinity, allowed: finite values")
