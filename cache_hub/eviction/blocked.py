"""Exact chain scores from queries, keys and the log-sum-exp of the prefill: no n x n matrix, memory linear in n.

Source: reference section 8.5. Rows of attention are recomputed block by block from the last to the first, n^2 D
multiply-adds a query head, the score half of one more attention pass.

Products of float16 and bfloat16 inputs are summed in float32 (exact products; on CUDA in tensor cores where torch has
`bmm` with `out_dtype`, 2.8 and later); everything after them is float32, or float64 for float64 inputs. Products of
float32 on CUDA follow torch's own setting of TF32.
"""

import torch
from torch import Tensor

from .chain_inputs import raise_absorbing, start_distribution
from .checks import check_gamma, check_sinks, check_temperature

# Weights of attention held at a time over all heads: 64 MiB of float32.
_TILE = 1 << 24
_MIXED_PRODUCTS = "dtype" in torch.ops.aten.bmm.overloads()


@torch.no_grad()
def causal_log_sum_exp(
    query: Tensor, key: Tensor, block: int = 256, temperature: float = 1.0, scale: float | None = None
) -> Tensor:
    """Log-sum-exp of every row of causal logits, [B, H, n], float32 (float64 for float64).

    query [B, H, n, D], key [B, Hkv, n, D], H a multiple of Hkv; logits are scale / temperature times the products,
    scale D^-0.5 unless given. Raises ValueError for other shapes, a block below 1 and a temperature not above 0.
    """
    return _log_sums(_BlockRows(query, key, block, temperature, scale), block)[0]


@torch.no_grad()
def blocked_chain_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None = None,
    start: str | Tensor = "query",
    sink_size: int = 4,
    gamma: float = 1.0,
    window: int = 64,
    temperature: float = 1.0,
    block: int = 256,
    scale: float | None = None,
    probability: bool = False,
) -> Tensor:
    """`absorbing_chain_scores` of the causal attention of query and key, [B, H, n], float32 (float64 for float64).

    query [B, H, n, D], key [B, Hkv, n, D], H a multiple of Hkv: the query heads of a group share its keys. lse: natural
    log-sum-exp of the rows, [B, H, n], as flash attention returns it; without it, or at a temperature other than 1,
    which has a normaliser of its own, it is computed by one more pass. scale is D^-0.5 unless given. `block` rows are
    solved together; it need not divide n. probability: of ever coming to a token, as `visit_probabilities`, in place of
    the visits.

    Raises ValueError as `absorbing_chain_scores`, and for shapes that do not fit, a block below 1, and inputs with NaN
    or infinity. A token may attend to hardly anything but itself, as some of real models do: what leaves it, 1 - Q_jj,
    comes from the pass that makes the lse. With an lse that is given it is a difference, and a chain counts as singular
    where that is below what rounding of the lse leaves of it.
    Nothing waits for the device before the end, but for the check of a start that is a tensor.
    """
    check_gamma(gamma)
    rows = _BlockRows(query, key, block, temperature, scale)
    n = rows.n
    check_sinks(sink_size, n)
    given = lse is not None and temperature == 1
    if lse is None or temperature != 1:
        lse, leaving = _log_sums(rows, block)
        leaving = leaving.exp_().mul_(gamma).add_(1 - gamma)
    elif lse.shape == query.shape[:3]:
        leaving = 1 - gamma * self_transitions(query, key, lse, 1.0, scale)
    else:
        raise ValueError(f"lse: got shape {list(lse.shape)}, allowed: {list(query.shape[:3])}")
    shift = lse.to(rows.dtype).neg().unsqueeze(3)
    scores = start_distribution(start, n, sink_size, window, rows.dtype, query.device).expand(query.shape[:3]).clone()
    leaving[..., :sink_size] = 1
    for high in range(n, sink_size, -block):
        low = max(sink_size, high - block)
        system = rows.diagonal_logits(low, high, shift).exp_().mul_(-gamma)
        system.diagonal(dim1=-2, dim2=-1).copy_(leaving[..., low:high])
        entering = scores[..., None, low:high]
        solved = torch.linalg.solve_triangular(system, entering, upper=False, left=False)
        scores[..., low:high] = solved.squeeze(2)
        onward = (gamma * solved).flatten(0, 1)
        for first, last in rows.tiles(low, high):
            weights = rows.logits(low, high, first, last, shift).exp_()
            scores[..., first:last] += (onward @ weights.flatten(0, 1)).view(*query.shape[:2], last - first)
    # A logit and its log-sum-exp, summed in different orders, differ by some roundings of their size.
    rounding = 8 * torch.finfo(rows.dtype).eps * (1 + shift.squeeze(3).abs()) if given else 0.0
    _check_solved(scores, leaving <= rounding)
    return scores.mul_(leaving) if probability else scores


def self_transitions(
    query: Tensor, key: Tensor, lse: Tensor, temperature: float = 1.0, scale: float | None = None
) -> Tensor:
    """Weight [B, H, n] of every token for itself, for `visit_probabilities`; arguments as `blocked_chain_scores`, lse
    being that of the logits over the temperature. Float32 (float64 for float64)."""
    rows = _BlockRows(query, key, 1, temperature, scale)
    grouped = query.unflatten(1, (key.shape[1], -1)).to(rows.dtype)
    products = torch.einsum("bkgnd,bknd->bkgn", grouped, key.to(rows.dtype)).flatten(1, 2)
    return products.mul_(rows.scale).sub_(lse).exp_()


class _BlockRows:
    """Logits of blocks of query rows against tiles of keys, query heads of a group stacked over their shared keys."""

    def __init__(self, query: Tensor, key: Tensor, block: int, temperature: float, scale: float | None) -> None:
        check_temperature(temperature)
        _check_shapes(query, key, block)
        self.n = query.shape[2]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.scale = (query.shape[3] ** -0.5 if scale is None else scale) / temperature
        self._grouped, self._key = query.unflatten(1, (key.shape[1], -1)), key
        self._heads = query.shape[:2]
        self.heads_and_tokens, self.device = query.shape[:3], query.device
        self._mixed = query.is_cuda and query.element_size() == 2 and _MIXED_PRODUCTS

    def tiles(self, low: int, high: int) -> list[tuple[int, int]]:
        """Ranges of keys before row `low`, each so long that its weights for rows low to high fill a tile."""
        batch, heads = self._heads
        step = max(1, _TILE // (batch * heads * (high - low)))
        return [(first, min(first + step, low)) for first in range(0, low, step)]

    def logits(self, low: int, high: int, first: int, last: int, shift: Tensor | None = None) -> Tensor:
        """[B, H, high - low, last - first] of rows low to high and keys first to last, scaled, not masked, with
        shift [B, H, n, 1] added to each row."""
        queries = self._grouped[:, :, :, low:high].flatten(2, 3).flatten(0, 1)
        keys = self._key[:, :, first:last].flatten(0, 1).mT
        if self._mixed:
            products = torch.bmm(queries, keys, out_dtype=torch.float32)
        else:
            products = queries.to(self.dtype) @ keys.to(self.dtype)
        products = products.view(*self._heads, high - low, last - first)
        if shift is None:
            return products.mul_(self.scale)
        return torch.add(shift[:, :, low:high], products, alpha=self.scale, out=products)

    def diagonal_logits(self, low: int, high: int, shift: Tensor | None = None) -> Tensor:
        """[B, H, high - low, high - low] of the block on the diagonal, -inf above it."""
        future = torch.ones(high - low, high - low, dtype=torch.bool, device=self._key.device).triu_(1)
        return self.logits(low, high, low, high, shift).masked_fill_(future, -torch.inf)


def _check_shapes(query: Tensor, key: Tensor, block: int) -> None:
    batch, heads, n, head_dim = query.shape
    if key.ndim != 4 or (key.shape[0], *key.shape[2:]) != (batch, n, head_dim) or heads % key.shape[1]:
        raise ValueError(
            f"key: got shape {list(key.shape)}, allowed: [{batch}, a divisor of {heads}, {n}, {head_dim}] "
            f"for query {list(query.shape)}"
        )
    if key.dtype != query.dtype or not query.is_floating_point():
        raise ValueError(f"dtypes: got query {query.dtype}, key {key.dtype}, allowed: one floating point type for both")
    if block < 1:
        raise ValueError(f"block: got {block}, allowed: >= 1")


def _log_sums(rows: _BlockRows, block: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [B, H, n] of every row, and the logarithm of the share of it that is not the row's own token."""
    sums, leaving = (torch.empty(rows.heads_and_tokens, dtype=rows.dtype, device=rows.device) for _ in range(2))
    for low in range(0, rows.n, block):
        high = min(low + block, rows.n)
        logits = rows.diagonal_logits(low, high)
        own = logits.diagonal(dim1=-2, dim2=-1).clone()
        logits.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
        others = logits.logsumexp(-1)
        for first, last in rows.tiles(low, high):
            others = torch.logaddexp(others, rows.logits(low, high, first, last).logsumexp(-1))
        total = torch.logaddexp(others, own)
        sums[..., low:high], leaving[..., low:high] = total, others - total
    return sums, leaving


def _check_solved(scores: Tensor, singular: Tensor) -> None:
    """Raises ValueError for a singular chain and for scores that are not finite; the one wait for the device."""
    if bool(singular.any() | ~scores.isfinite().all()):
        if bool(singular.any()):
            raise_absorbing(singular)
        raise ValueError("query, key or lse: got NaN or infinity, allowed: finite values")
