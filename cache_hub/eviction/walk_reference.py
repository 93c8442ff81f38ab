"""The walkers in plain torch: the oracle of walk_kernels, with the same random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .walk_tables import WalkTables

_WORD = 0xFFFFFFFF


def torch_walks(
    tables: WalkTables, num_walkers: int, num_steps: int, seed: int, first_walker: int = 0, stream: int = 0
) -> Tensor:
    """Visits [R * S, n] int64 of walkers first_walker .. first_walker + num_walkers - 1 of every row.

    The random word of a step is the first of Philox 4x32-10 with the seed as key and the counter (walker, step, row,
    stream); step 0 draws the start. A walk makes num_steps steps at most.
    """
    rows, n = tables.starts.shape
    device = tables.starts.device
    counts = torch.zeros(rows * n, dtype=torch.int64, device=device)
    row = torch.arange(rows, device=device).repeat_interleave(num_walkers)
    walker = torch.arange(first_walker, first_walker + num_walkers, device=device).repeat(rows)
    ends, table, last = tables.starts.view(-1), row * n, torch.full_like(row, n - 1)
    absorbing, cumulative = tables.absorbing.reshape(-1), tables.cumulative.view(-1)
    for step in range(num_steps + 1):
        word = philox(seed, walker, torch.full_like(walker, step), row, torch.full_like(walker, stream))[0]
        token = _draw(ends, table, last, word, n)
        visited = row * n + token
        counts.index_add_(0, visited, torch.ones_like(visited))
        walking = ~absorbing[visited]
        row, walker, last = row[walking], walker[walking], token[walking]
        if not len(row):
            break
        ends, table = cumulative, (row // tables.sources * n + last) * n
    return counts.view(rows, n)


def philox(seed: int, *counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words as int64, for four counters of 32 bits as int64 and a key of 64 bits.

    Philox 4x32-10 of Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(10):
        (high0, low0), (high2, low2) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _product(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, in halves that int64 can hold."""
    low, high = a * (x & 0xFFFF), a * (x >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD


def _draw(cumulative: Tensor, table: Tensor, last: Tensor, word: Tensor, n: int) -> Tensor:
    """Tokens [L]: the first at or before `last` whose entry behind `table` is > (word * the last entry) >> 32."""
    wanted = (word * cumulative[table + last]) >> 32
    low, high = torch.zeros_like(last), last
    for _ in range((n - 1).bit_length()):
        middle = (low + high) >> 1
        beyond = cumulative[table + middle] > wanted
        low, high = torch.where(beyond, low, middle + 1), torch.where(beyond, middle, high)
    return high
