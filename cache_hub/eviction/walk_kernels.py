"""Triton kernel of the walkers: a program walks with a group of them, one lane each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .walk_tables import WalkTables

# Walkers of one program.
GROUP = 128


def triton_walks(
    tables: WalkTables, num_walkers: int, num_steps: int, seed: int, first_walker: int = 0, stream: int = 0
) -> Tensor:
    """`torch_walks` by the kernel, the same counts: one launch."""
    rows, n = tables.starts.shape
    counts = torch.zeros((rows, n), dtype=torch.int64, device=tables.starts.device)
    groups = triton.cdiv(num_walkers, GROUP)
    with torch.cuda.device_of(counts):
        walk_kernel[(rows * groups,)](
            tables.cumulative, tables.starts, tables.absorbing.contiguous().view(torch.uint8), counts,
            seed, stream, first_walker, num_walkers, num_steps, n, groups, tables.sources,
            GROUP=GROUP, ROUNDS=(n - 1).bit_length(), num_warps=GROUP // 32,
        )  # fmt: skip
    return counts


@triton.jit
def _draw(table, last, walking, word, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens [GROUP]: the first at or before `last` whose entry behind `table` is > (word * the last entry) >> 32."""
    total = tl.load(table + last, mask=walking, other=1)
    wanted = tl.umulhi(word, total.to(tl.uint32)).to(tl.int32)
    low = tl.zeros_like(last)
    high = last
    for _ in range(ROUNDS):
        middle = (low + high) >> 1
        beyond = tl.load(table + middle, mask=walking, other=1) > wanted
        low = tl.where(beyond, low, middle + 1)
        high = tl.where(beyond, middle, high)
    return high


@triton.jit(do_not_specialize=["seed", "stream", "first_walker", "num_walkers", "num_steps", "n", "groups", "sources"])
def walk_kernel(  # type: ignore[no-untyped-def]
    cumulative, starts, absorbing, counts,
    seed, stream, first_walker, num_walkers, num_steps, n, groups, sources,
    GROUP: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """One program: GROUP walkers of one row, until all are absorbed or have made num_steps steps."""
    row = tl.program_id(0) // groups
    lane = tl.program_id(0) % groups * GROUP + tl.arange(0, GROUP)
    walking = lane < num_walkers
    walker = first_walker + lane
    same = tl.zeros_like(walker)
    rows_before = row.to(tl.int64) * n
    matrix = cumulative + (row // sources).to(tl.int64) * n * n
    visits = counts + rows_before
    token = same + n - 1
    table = starts + rows_before + same
    step = 0
    while (step <= num_steps) & (tl.max(walking.to(tl.int32), 0) > 0):
        word, _, _, _ = tl.philox(seed, walker, same + step, same + row, same + stream)
        token = _draw(table, token, walking, word, ROUNDS)
        tl.atomic_add(visits + token, tl.full([GROUP], 1, tl.int64), mask=walking, sem="relaxed")
        ended = tl.load(absorbing + rows_before + token, mask=walking, other=1)
        walking = walking & (ended == 0)
        table = matrix + token.to(tl.int64) * n
        step += 1
