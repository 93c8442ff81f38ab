"""Keys in CPU memory as the native code reads them: the store's own, or a compact copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _native

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_INT8 = 3


def as_key_store(keys: Tensor, extra: Tensor | None = None) -> _native.KeyStore:
    """A native view of keys, or values, [R, N, D] on the CPU, whose last dimension must be contiguous, and of extra
    [R, N] float32, contiguous; see TokenIndex.build. Copies nothing."""
    if keys.device.type != "cpu" or keys.dtype not in DTYPES or keys.stride(2) != 1:
        raise ValueError(
            f"rows: got {keys.dtype} on {keys.device} with strides {keys.stride()}, allowed: float32, float16 or "
            "bfloat16 in CPU memory with contiguous rows"
        )
    return _view(keys, DTYPES[keys.dtype], extra, None)


def stored_key_bytes(keys: Tensor, extra: Tensor | None) -> int:
    """Of one of keys [R, N, D], with the dimension `extra` if there is one."""
    return keys.shape[2] * keys.element_size() + (0 if extra is None else extra.element_size())


@dataclass(frozen=True)
class CompactKeys:
    """Keys less their mean, in 8 bits: key i of row r is about scales[r, i] * codes[r, i] + means[r].

    codes [R, N, D] int8, scales [R, N] and means [R, D] float32, on the CPU. Without the mean all inner products of a
    query are lower by the same number, which leaves their order as it is. A scale for each key, because one for all
    keys of a head leaves little of the others beside a key of huge norm.
    """

    codes: Tensor
    scales: Tensor
    means: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> CompactKeys:
        """From keys [R, N, D] of any float type on the CPU."""
        rows, _, dim = keys.shape
        means = torch.stack([row.mean(0, dtype=torch.float32) for row in keys])
        return cls(torch.empty(rows, 0, dim, dtype=torch.int8), torch.empty(rows, 0), means).grown(keys)

    def grown(self, keys: Tensor) -> CompactKeys:
        """With those of keys [R, N', D] that are not in it yet; the means stay, so that scores remain comparable."""
        rows, n, dim = keys.shape
        first = self.codes.shape[1]
        codes, scales = torch.empty(rows, n - first, dim, dtype=torch.int8), torch.empty(rows, n - first)
        for row, fresh in enumerate(keys[:, first:]):  # float32 copies of one row at a time
            centred = fresh.float() - self.means[row]
            scales[row] = centred.abs().amax(1) / 127
            # A key that is the mean has the scale 0, and codes of 0.
            codes[row] = (centred / scales[row].clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
        return CompactKeys(torch.cat((self.codes, codes), 1), torch.cat((self.scales, scales), 1), self.means)

    def view(self, extra: Tensor | None) -> _native.KeyStore:
        """As as_key_store."""
        return _view(self.codes, _INT8, extra, self.scales)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.means.nbytes


def _view(keys: Tensor, code: int, extra: Tensor | None, scales: Tensor | None) -> _native.KeyStore:
    heads, n, dim = keys.shape
    beside, factors = (0 if t is None else t.data_ptr() for t in (extra, scales))
    return _native.KeyStore(keys.data_ptr(), code, heads, n, dim, keys.stride(0), keys.stride(1), beside, factors)
