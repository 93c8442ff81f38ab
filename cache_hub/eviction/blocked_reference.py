"""What the blocked chain consists of in plain torch, on any device and for any floating type: the kernels' oracle.

Products of float16 and bfloat16 inputs are summed in float32 (exact products; on CUDA in tensor cores where torch has
`bmm` with `out_dtype`, 2.8 and later); everything after them is float32, or float64 for float64 inputs. Products of
float32 on CUDA follow torch's own setting of TF32.
"""

import torch
from torch import Tensor

# Rows solved together, and weights of attention held at a time over all heads: 64 MiB of float32.
_BLOCK, _TILE = 256, 1 << 24
# Tokens whose logits for themselves are made together: with 32 heads of 128 in float32 64 MiB, and as much of queries.
_TOKENS = 4096
_MIXED_PRODUCTS = "dtype" in torch.ops.aten.bmm.overloads()


def torch_log_sums(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [B, H, n] of every causal row of scale * query key^T, and that of the row without its own token, -inf
    for token 0; float32 (float64 for float64). query [B, H, n, D], key [B, Hkv, n, D]."""
    rows = _BlockRows(query, key, scale)
    total, others = (torch.empty(query.shape[:3], dtype=rows.dtype, device=query.device) for _ in range(2))
    for low in range(0, rows.n, _BLOCK):
        high = min(low + _BLOCK, rows.n)
        logits = rows.earlier_logits(low, high)
        without = logits.logsumexp(-1)
        for first, last in rows.tiles(low, high):
            without = torch.logaddexp(without, rows.logits(low, high, first, last).logsumexp(-1))
        others[..., low:high] = without
        total[..., low:high] = torch.logaddexp(without, own_logits(query[:, :, low:high], key[:, :, low:high], scale))
    return total, others


def torch_solve(query: Tensor, key: Tensor, shift: Tensor, mass: Tensor, scale: float, sink_size: int) -> None:
    """mass [B, H, k, n] becomes y = mass + y M with M_ij = exp(scale <q_i, k_j> - shift_i) for j < i, i >= sink_size.

    One back-substitution, a block of rows after the other from the last to the first, n^2 D multiply-adds a query
    head; shift [B, H, n]. Nothing waits for the device.
    """
    rows = _BlockRows(query, key, scale)
    less = -shift.unsqueeze(3)
    for high in range(rows.n, sink_size, -_BLOCK):
        low = max(sink_size, high - _BLOCK)
        system = rows.earlier_logits(low, high, less).exp_().neg_()
        entering = mass[..., low:high]
        solved = torch.linalg.solve_triangular(system, entering, upper=False, left=False, unitriangular=True)
        mass[..., low:high] = solved
        for first, last in rows.tiles(low, high):
            mass[..., first:last] += solved @ rows.logits(low, high, first, last, less).exp_()


def own_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Logit [B, H, n] of every token for itself, float32 (float64 for float64)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = torch.empty(query.shape[:3], dtype=dtype, device=query.device)
    for low in range(0, query.shape[2], _TOKENS):
        asked, seen = (part[:, :, low : low + _TOKENS].to(dtype) for part in (query, key))
        products = asked.unflatten(1, (key.shape[1], -1)) * seen.unsqueeze(2)
        logits[:, :, low : low + _TOKENS] = products.sum(-1).flatten(1, 2).mul_(scale)
    return logits


class _BlockRows:
    """Logits of blocks of query rows against tiles of keys, query heads of a group stacked over their shared keys."""

    def __init__(self, query: Tensor, key: Tensor, scale: float) -> None:
        self.n, self.scale = query.shape[2], scale
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self._grouped, self._key = query.unflatten(1, (key.shape[1], -1)), key
        self._heads = query.shape[:2]
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

    def earlier_logits(self, low: int, high: int, shift: Tensor | None = None) -> Tensor:
        """[B, H, high - low, high - low] of the block on the diagonal, -inf on and above it."""
        rest = torch.ones(high - low, high - low, dtype=torch.bool, device=self._key.device).triu_()
        return self.logits(low, high, low, high, shift).masked_fill_(rest, -torch.inf)
