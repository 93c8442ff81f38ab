"""Monte-Carlo walkers against the direction of attention: from a token to one that it attends to, until a sink.

They are the published form of CircuitKV and the test of its exact solves: the mean of many walks is the expected
number of visits, with Var(visits_j) = N_qj (2 N_jj - 1) - N_qj^2 for N = (I - Q)^-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .chain import compute_transition_matrix
from .checks import choose_backend
from .importance import to_unit
from .walk_reference import torch_walks
from .walk_tables import WalkTables, start_rows, transition_tables

BACKENDS = ("torch", "triton")
# Steps per token, with num_steps None: a walk moves n times at most, the others stay where they are.
_LONGEST = 64


def simulate_walks(
    transitions: Tensor,
    num_walkers: int,
    num_steps: int | None,
    sink_size: int,
    start: str | Tensor = "query",
    seed: int = 0,
    absorbing: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """How often the walks of each head visit each token: [B, H, n] int64.

    transitions [B, H, n, n] of any floating dtype, causal, rows sum to 1. Every head has num_walkers walks, whose first
    token ("query": the last one; "uniform": any that does not absorb; or probabilities [n]) counts as visited. A walk
    ends with its visit of an absorbing token: the first sink_size and those of `absorbing` (bool [n] or [B, H, n]), or
    after num_steps steps. num_steps None: no bound; a walk that is not absorbed within 64 n steps is then an error.
    backend: "triton" (GPU), "torch", or "auto" (triton on a GPU); all give the same counts for a seed (0 to 2^63 - 1),
    and a head's do not depend on the number of walkers of others. Probabilities are rounded to multiples of 2^-30.

    Raises ValueError for transitions that are not causal, not finite or do not sum to 1, for numbers out of bounds, and
    with num_steps None for a token that never leaves itself and for walks that are not absorbed.
    """
    layer = [transitions]
    given = None if absorbing is None else [absorbing]
    starts = start if isinstance(start, str) else [start]
    return batched_walk_simulation(layer, num_walkers, num_steps, sink_size, starts, seed, given, backend)[0]


def batched_walk_simulation(
    transitions: Sequence[Tensor],
    num_walkers: int,
    num_steps: int | None,
    sink_size: int,
    start: str | Sequence[Tensor] = "query",
    seed: int = 0,
    absorbing: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """simulate_walks of many matrices [B_l, H_l, n_l, n_l] of different sizes, such as a model's layers or prompts of
    different lengths: a list of visits [B_l, H_l, n_l] int64, one launch for all heads of each.

    start and absorbing: one tensor per matrix. The walks of matrices are independent: the matrix's place in the list is
    part of the counter of the random numbers, and the first has those of simulate_walks.
    """
    check_walks(num_walkers, num_steps, seed)
    starts: Sequence[str | Tensor] = [start] * len(transitions) if isinstance(start, str) else start
    extra = [None] * len(transitions) if absorbing is None else absorbing
    for name, given in (("start", starts), ("absorbing", extra)):
        if len(given) != len(transitions):
            raise ValueError(f"{name}: got {len(given)} tensors, allowed: {len(transitions)}, one per matrix")
    visits = []
    for stream, (matrix, begin, ends) in enumerate(zip(transitions, starts, extra, strict=True)):
        tables = transition_tables(matrix, sink_size, begin, ends)
        counts = count_visits(tables, num_walkers, num_steps, seed, backend, stream=stream)
        visits.append(counts.view(matrix.shape[:3]))
    return visits


def check_walks(num_walkers: int, num_steps: int | None, seed: int) -> None:
    """Raises ValueError for a number of walkers or steps or a seed out of bounds."""
    for name, value, lowest, highest in (
        ("num_walkers", num_walkers, 1, 2**31 - 1),
        ("num_steps", 1 if num_steps is None else num_steps, 1, 2**31 - 2),
        ("seed", seed, 0, 2**63 - 1),
    ):
        if not lowest <= value <= highest:
            raise ValueError(f"{name}: got {value}, allowed: {lowest} to {highest}")


def count_visits(
    tables: WalkTables,
    num_walkers: int,
    num_steps: int | None,
    seed: int,
    backend: str = "auto",
    first_walker: int = 0,
    stream: int = 0,
) -> Tensor:
    """Visits [R * S, n] int64 by a backend; raises ValueError as simulate_walks does."""
    n = tables.starts.shape[1]
    name = choose_backend(backend, tables.starts)
    if num_steps is None:
        _check_leaves(tables)
    steps = _LONGEST * n if num_steps is None else num_steps
    if name == "torch":
        counts = torch_walks(tables, num_walkers, steps, seed, first_walker, stream)
    else:
        from .walk_kernels import triton_walks  # Triton only where it is used

        counts = triton_walks(tables, num_walkers, steps, seed, first_walker, stream)
    if num_steps is None:
        left = len(counts) * num_walkers - int((counts * tables.absorbing).sum())
        if left:
            total = len(counts) * num_walkers
            raise ValueError(
                f"num_steps: got None, but {left} of {total} walks were not absorbed within {steps} steps;"
                " allowed there: a number"
            )
    return counts


def _check_leaves(tables: WalkTables) -> None:
    """Raises ValueError where a walk would stay at a token for ever."""
    count, n, _ = tables.cumulative.shape
    rows = torch.arange(1, n, device=tables.cumulative.device)
    stays = tables.cumulative[:, rows, rows - 1] == 0
    stuck = stays & ~tables.absorbing.view(count, tables.sources, n)[:, :, 1:].all(1)
    if bool(stuck.any()):
        head, token = (int(place) for place in stuck.nonzero()[0])
        raise ValueError(
            f"transitions: got Q[{token + 1},{token + 1}] = 1 in matrix {head}: token {token + 1} is absorbing;"
            " allowed with num_steps None: tokens that can be left, sinks and `absorbing`"
        )


def causal_influence_walk(
    attention_matrix: Tensor,
    num_walkers: int = 100,
    num_steps: int = 10,
    temperature: float = 1.0,
    sink_size: int = 4,
    seed: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Scores [B, H, n] float32 in [0, 1] of CircuitKV's influence walker: visits / sqrt(n - j + 1), divided by the
    highest of the tokens that are not sinks; sinks have 1.

    attention_matrix [B, H, n, n], causal, rows sum to 1, with rows A^(1 / temperature) renormalised. Half of the
    walkers (the odd one too) start at the last token, half at any token behind the sinks.

    The published walker takes the sinks out of the rows and renormalises the rest, whereby the first token behind them
    cannot be left (a singular chain, and a walker's remaining steps are all visits of it); here sinks absorb instead.
    It also mixes two temperatures (70 % of 10,000 walkers with 2, 30 % with 10); here there is one.

    Raises ValueError for attention that is not causal, not finite or does not sum to 1 and numbers out of bounds.
    """
    check_walks(num_walkers, num_steps, seed)
    transitions = compute_transition_matrix(attention_matrix, temperature)
    by_query = transition_tables(transitions, sink_size, "query")
    uniform = replace(by_query, starts=start_rows("uniform", by_query.absorbing))
    second = num_walkers // 2
    counts = count_visits(by_query, num_walkers - second, num_steps, seed, backend)
    if second:
        counts += count_visits(uniform, second, num_steps, seed, backend, first_walker=num_walkers - second)
    n = counts.shape[1]
    after = n + 1 - torch.arange(n, device=counts.device)
    return to_unit(counts.view(transitions.shape[:3]) / after.sqrt(), sink_size)
