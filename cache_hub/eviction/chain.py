"""Exact visits of random walks that go backwards along causal attention, by triangular solves of the whole matrix.

The exact form of CircuitKV's scores. All functions take attention [B, H, n, n], causal, rows summing to 1, compute in
float32 at least (float64 for float64) and return that. They raise ValueError for attention of another
shape, with NaN, with an entry above the diagonal (naming it), or with a row that does not sum to 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .chain_inputs import raise_absorbing, start_distribution
from .checks import check_causal, check_gamma, check_sinks, check_temperature


def compute_transition_matrix(attn: Tensor, temperature: float = 1.0) -> Tensor:
    """P [B, H, n, n]: rows of attn^(1 / temperature), renormalised; computed in logarithms, zeros stay zero.

    Raises ValueError for a temperature that is not above 0 and finite, and for attention as the module says.
    """
    return _transitions(attn, temperature)


def absorbing_chain_scores(
    attn: Tensor,
    start: str | Tensor = "query",
    sink_size: int = 4,
    temperature: float = 1.0,
    gamma: float = 1.0,
    window: int = 64,
) -> Tensor:
    """Expected visits [B, H, n], discounted by gamma a step, of a walk that the first sink_size tokens absorb.

    x = a + gamma x Q, one triangular solve; for a sink the (discounted) mass absorbed there, which is its column of B.
    start: "query" (the last token), "uniform" (all tokens but the sinks), "window" (the last `window` tokens), or
    masses [n] or [B, H, n]. Raises ValueError, beside the module's, for a gamma outside (0, 1], sinks outside 1 to
    n - 1, an unknown start, and a singular chain: "token 4 is absorbing: Q[4,4] = 1".
    """
    check_gamma(gamma)
    transitions = _transitions(attn, temperature)
    n = attn.shape[-1]
    check_sinks(sink_size, n)
    mass = start_distribution(start, n, sink_size, window, transitions.dtype, attn.device)
    transitions[..., :sink_size, :] = 0
    return _visits(transitions, mass.expand(attn.shape[:3]).unsqueeze(2), gamma).squeeze(2)


def visit_probabilities(visits: Tensor, self_transitions: Tensor, sink_size: int = 4, gamma: float = 1.0) -> Tensor:
    """Probability of ever coming to a token, [B, H, n]: f_j = x_j (1 - gamma Q_jj), without the diagonal's self-loop.

    visits [B, H, n]: scores of the chain with the same sinks and gamma; self_transitions [B, H, n]: the diagonal of P.
    Sinks keep their absorbed mass, which is the probability already.
    """
    leaving = 1 - gamma * self_transitions
    leaving[..., :sink_size] = 1
    return visits * leaving


def personalized_pagerank_scores(attn: Tensor, alpha: float = 0.85) -> Tensor:
    """PageRank [B, H, n] of a walk that goes on with probability alpha and else returns to the last token.

    pi = (1 - alpha) e_q (I - alpha P)^-1 over all tokens, no sinks; sums to 1. Raises ValueError for alpha outside
    (0, 1), at which token 0 would absorb everything, and for attention as the module says.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: got {alpha}, allowed: above 0, below 1")
    transitions = _transitions(attn, 1.0)
    mass = start_distribution("query", attn.shape[-1], 0, 1, transitions.dtype, attn.device)
    visits = _visits(transitions, mass.expand(attn.shape[:3]).unsqueeze(2), alpha).squeeze(2)
    return (1 - alpha) * visits


def landmark_absorbing_scores(
    attn: Tensor,
    landmarks: Tensor | Sequence[int],
    sink_size: int = 4,
    temperature: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """Expected visits [B, H, m + 1, n] of walks from each landmark and, last, from the query (the last token).

    A walk is absorbed by the sinks and by every landmark but the one it starts from; for absorbing tokens the score is
    the mass absorbed there. landmarks: m distinct tokens behind the sinks, [m] or [B, H, m].

    A causal walk never comes back to a token that it left, so all walks share one matrix, in which the rows of all
    their sources are zero: the walk from token r makes 1 / (1 - gamma P_rr) visits to r and goes on from gamma times as
    many of row r. Raises ValueError as `absorbing_chain_scores` and for landmarks that are sinks, outside or repeated.
    """
    check_gamma(gamma)
    transitions = _transitions(attn, temperature)
    batch, heads, n = attn.shape[:3]
    check_sinks(sink_size, n)
    sources = _sources(landmarks, batch, heads, sink_size, n, attn.device)
    at_source = torch.zeros(*sources.shape, n, dtype=torch.bool, device=attn.device).scatter_(
        3, sources.unsqueeze(3), True
    )
    onward = transitions.gather(2, sources.unsqueeze(3).expand(-1, -1, -1, n)).masked_fill_(at_source, 0.0)
    leaving = 1 - gamma + gamma * onward.sum(-1)
    if bool((leaving <= 0).any()):
        raise_absorbing(torch.zeros(batch, heads, n, device=attn.device).scatter_(2, sources, 1.0 * (leaving <= 0)) > 0)
    absorbed = at_source.any(2)
    absorbed[..., :sink_size] = True
    transitions.masked_fill_(absorbed.unsqueeze(3), 0.0)
    visits = _visits(transitions, gamma * onward / leaving.unsqueeze(3), gamma)
    return visits + at_source / leaving.unsqueeze(3)


def effective_resistance_scores(attn: Tensor, sink_size: int = 4) -> Tensor:
    """Current [B, H, n] through each token when one unit flows from the last token into the sinks.

    Attention between two tokens is the conductance between them, self-attention left out; score_j is half the sum over
    i of W_ij |v_i - v_j|, with the sinks at potential 0. An analysis tool, not for prefill: a Cholesky factor per head,
    n^3 / 3 multiply-adds and several n x n matrices. Raises ValueError, beside the module's, for sinks outside 1 to
    n - 1 and for tokens that no path of conductances connects with a sink.
    """
    conductances = attention_conductances(attn)
    potentials = grounded_potentials(conductances, sink_size).unsqueeze(-1)
    return ((potentials - potentials.mT).abs() * conductances).sum(-1).div(2)


def attention_conductances(attn: Tensor) -> Tensor:
    """Symmetric W [B, H, n, n], W_ij = attn[max(i, j), min(i, j)] and 0 on the diagonal, in float32 at least."""
    check_causal(attn, "attn")
    below = attn.to(torch.promote_types(attn.dtype, torch.float32)).tril(-1)
    return below + below.mT


def grounded_potentials(conductances: Tensor, sink_size: int = 4) -> Tensor:
    """Potentials v [B, H, n] of symmetric conductances [B, H, n, n] with one unit flowing from the last token into the
    sinks at potential 0; v of the last token is its effective resistance to the sinks.

    Raises ValueError for sinks outside 1 to n - 1 and for tokens that are not connected with a sink.
    """
    n = conductances.shape[-1]
    check_sinks(sink_size, n)
    laplacian = conductances.sum(-1).diag_embed() - conductances
    factor, info = torch.linalg.cholesky_ex(laplacian[..., sink_size:, sink_size:])
    if bool(info.any()):
        batch, head = (int(i) for i in info.nonzero()[0])
        raise ValueError(
            f"conductances: some of the tokens up to {sink_size + int(info[batch, head]) - 1} are not connected with a "
            f"sink (batch {batch}, head {head}), allowed: a path from every token"
        )
    current = torch.zeros(*conductances.shape[:2], n - sink_size, 1, dtype=factor.dtype, device=factor.device)
    current[..., -1, 0] = 1
    return pad(torch.cholesky_solve(current, factor).squeeze(-1), (sink_size, 0))


def _sources(
    landmarks: Tensor | Sequence[int], batch: int, heads: int, sink_size: int, n: int, device: torch.device
) -> Tensor:
    """Landmarks and the query, [B, H, m + 1] int64, checked."""
    ids = torch.as_tensor(landmarks, dtype=torch.int64, device=device)
    if ids.ndim != 1 and ids.shape[:-1] != (batch, heads):
        raise ValueError(f"landmarks: got shape {list(ids.shape)}, allowed: [m] or [{batch}, {heads}, m]")
    wrong = ids[(ids < sink_size) | (ids >= n)]
    if wrong.numel():
        raise ValueError(f"landmarks: got {int(wrong[0])}, allowed: {sink_size} to {n - 1}")
    ordered = ids.sort(-1).values
    twice = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
    if twice.numel():
        raise ValueError(f"landmarks: got {int(twice[0])} more than once, allowed: distinct tokens")
    return torch.cat((ids.expand(batch, heads, ids.shape[-1]), ids.new_full((batch, heads, 1), n - 1)), 2)


def _transitions(attn: Tensor, temperature: float) -> Tensor:
    """compute_transition_matrix in float32 at least; a tensor of its own."""
    check_temperature(temperature)
    check_causal(attn, "attn")
    logits = attn.to(torch.promote_types(attn.dtype, torch.float32)).log()
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)


def _visits(transitions: Tensor, mass: Tensor, gamma: float) -> Tensor:
    """x [B, H, k, n] with x = mass + gamma x P, for mass [B, H, k, n] and P [B, H, n, n] whose absorbing rows are zero.

    Overwrites P. The diagonal of I - gamma P is taken as 1 - gamma plus gamma times the rest of the row: a difference
    from 1 would lose all digits where a token attends to hardly anything but itself.
    """
    n = transitions.shape[-1]
    absorbing = transitions.sum(-1) == 0
    diagonal = transitions.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_()
    leaving = torch.where(absorbing, 1.0, 1 - gamma + gamma * transitions.sum(-1))
    if bool((leaving <= 0).any()):
        raise_absorbing(leaving <= 0)
    transitions.mul_(-gamma)
    diagonal.copy_(leaving)
    return torch.linalg.solve_triangular(transitions, mass.expand(*mass.shape[:3], n), upper=False, left=False)
