"""The variants of retrieval and tail estimate, each a function of an ExactHead; budgets are shares of the clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from cache_hub.clusters import Clusters

from .exact_head import ClusterRule, ExactHead, Outcome, tokens_read

_NEVER = float("-inf")


def top(head: ExactHead, count: int, united: bool) -> Outcome:
    """Each query head's best `count` tokens, or their union over the group, and nothing for the rest."""
    best = head.best(count)
    attended = best.any(0).expand_as(best) if united else best
    return Outcome(head.attend(head.logits.where(attended, _NEVER))[0], tokens_read(best))


def top_with_tail(
    head: ExactHead,
    count: int,
    rule: ClusterRule,
    share: float = 1.0,
    corrected: bool = False,
    rounded: bool = False,
) -> Outcome:
    """The union of the best `count` and, for the rest, the clusters less what was retrieved: see with_tail."""
    return with_tail(head, head.best(count).any(0), rule, share, corrected, rounded)


def with_tail(
    head: ExactHead,
    retrieved: Tensor,
    rule: ClusterRule,
    share: float = 1.0,
    corrected: bool = False,
    rounded: bool = False,
) -> Outcome:
    """The tokens retrieved [t, N] bool, and the clusters for the others, as cache_hub.tail has it.

    share: of the clusters, those of largest estimated mass summed over the group; 1 is all. corrected: the key of a
    cluster is the mean of the members that are left instead of the mean of all. rounded: centroids and mean values
    are bfloat16.
    """
    clusters = head.clusters(rule)
    of_token, sizes = clusters.assignment[0].long(), clusters.sizes[0].float()
    left = sizes - _members(retrieved, of_token, len(sizes))
    centroids = clusters.centroids[0]
    if rounded:
        centroids = centroids.bfloat16().float()
    logits = head.queries @ centroids.T
    chosen = left > 0
    if share < 1:
        chosen &= _largest((logits + sizes.log()).softmax(-1).sum(0), round(len(sizes) * share))
    if corrected:
        logits = _logits_of_the_rest(head, retrieved, of_token, left)
    estimated = chosen[:, of_token] & ~retrieved
    outputs, weights = head.attend(head.logits.where(retrieved, logits[..., of_token].where(estimated, _NEVER)))
    if rounded:
        outputs = outputs + _by_rounded_means(clusters, weights * estimated, left)
    return Outcome(outputs, tokens_read(retrieved), chosen.sum(1).double().mean().item())


def lift(head: ExactHead, draws: int, sample: str) -> Outcome:
    """A priority sample of `draws` tokens a query head (cache_hub.lift), for every row of head.log_u.

    sample "own": each head attends to its own sample, a token counts max(w, tau); "own u": so, and every head has its
    own u; "union": to the union of the group's samples, a token counts 1 / the probability that any head draws it.
    """
    outputs, tokens = [], 0.0
    for log_u in head.log_u:
        drawn, threshold = _draw(head.logits, log_u[:, None] if sample == "own u" else log_u[0], draws)
        if sample == "union":
            logits = _over_inclusion(head.logits, drawn, threshold)
        else:
            logits = torch.maximum(head.logits, threshold).where(drawn, _NEVER)
        outputs.append(head.attend(logits)[0])
        tokens += tokens_read(drawn) / len(head.log_u)
    return Outcome(torch.cat(outputs, 1), tokens)


def near_lift_far_centroids(head: ExactHead, count: int, rule: ClusterRule, near_share: float) -> Outcome:
    """Half of `count` exact, the other half drawn near, centroids far, without a control variate.

    Exact: the union of each query head's best count // 2 tokens. Near: the rest of the tokens of the `near_share` of
    the clusters that have most of the estimated mass left, summed over the group; of them each head draws count -
    count // 2 by priority, and the group attends to the union by inclusion probability. The other clusters stand for
    their tokens by the kept centroid. For every row of head.log_u.
    """
    clusters, exact = head.clusters(rule), head.best(count // 2).any(0)
    of_token, sizes = clusters.assignment[0].long(), clusters.sizes[0].float()
    left = sizes - _members(exact, of_token, len(sizes))
    logits = head.queries @ clusters.centroids[0].T
    near_clusters = _largest((logits + left.log()).softmax(-1).nan_to_num().sum(0), round(len(sizes) * near_share))
    near = near_clusters[:, of_token] & ~exact
    far = logits[..., of_token].where(~near, _NEVER)
    candidates, outputs, tokens = head.logits.where(near, _NEVER), [], 0.0
    for log_u in head.log_u[:, 0]:
        drawn, threshold = _draw(candidates, log_u, count - count // 2)
        sampled = _over_inclusion(head.logits, drawn, threshold)
        outputs.append(head.attend(head.logits.where(exact, sampled.where(near, far)))[0])
        tokens += tokens_read(exact | drawn.any(0)) / len(head.log_u)
    return Outcome(torch.cat(outputs, 1), tokens, (~near_clusters & (left > 0)).sum(1).double().mean().item())


def adaptive(head: ExactHead, bound: float, most: int, rule: ClusterRule, tail: bool) -> Outcome:
    """Each query head retrieves in order of score until the mass it misses is below `bound` of the total.

    The missing mass is what the clusters say (kept centroids, less the members retrieved), the total is that plus the
    exact mass of static and retrieved tokens; at most `most` tokens. The group attends to the union, and with `tail`
    to the clusters for the rest. Notes: tokens retrieved a head (count), share of (head, query) that came below the
    bound, missing mass as estimated and as it is, of a head's own tokens.
    """
    clusters = head.clusters(rule)
    of_token = clusters.assignment[0].long()
    most = min(most, head.logits.shape[-1])
    stood_for = (head.queries @ clusters.centroids[0].T)[..., of_token]
    everything = torch.cat((head.static_logits, head.logits), -1).logsumexp(-1, keepdim=True).double()
    best, ids = head.logits.topk(most, -1)
    exact, guessed = ((logits - everything).exp() for logits in (best, stood_for.double()))
    static = (head.static_logits - everything).exp().sum(-1, keepdim=True)
    # [g, t, most + 1]: with 0, 1, .. tokens retrieved
    sums = torch.nn.functional.pad(torch.stack((exact, guessed.gather(-1, ids))).cumsum(-1), (1, 0))
    missing = (guessed.sum(-1, keepdim=True) - sums[1]).clamp(min=0)
    missing = missing / (missing + static + sums[0])
    counts = (missing >= bound).long().cumprod(-1).sum(-1, keepdim=True).clamp(max=most)
    retrieved = torch.zeros_like(head.logits, dtype=torch.bool)
    retrieved.scatter_(-1, ids, torch.arange(most) < counts)
    reached = missing.gather(-1, counts)
    notes = {
        "count": counts.double().mean().item(),
        "below_bound": (reached < bound).double().mean().item(),
        "missing_estimated": reached.mean().item(),
        "missing": (1 - static - sums[0].gather(-1, counts)).mean().item(),
    }
    union = retrieved.any(0)
    if tail:
        found = with_tail(head, union, rule)
        return Outcome(found.outputs, found.tokens, found.clusters, notes)
    return Outcome(head.attend(head.logits.where(union, _NEVER))[0], tokens_read(union), 0.0, notes)


def wave(head: ExactHead, retrieval_budget: float, estimation_budget: float) -> Outcome:
    """RetroInfer's wave index (cache_hub.wave_index), the prompt alone."""
    counts, clusters = head.wave_counts(retrieval_budget, estimation_budget), head.clusters(ClusterRule("wave"))
    of_token = clusters.assignment[0].long()
    logits = head.queries @ clusters.centroids[0].T
    score = logits.softmax(-1).sum(0).masked_fill(clusters.sizes[0] == 0, -1)
    retrieved = _largest(score, counts.retrieved)
    estimated = _largest(score, counts.retrieved + counts.estimated) & ~retrieved & (clusters.sizes[0] > 0)
    members = retrieved[:, of_token]
    outputs, _ = head.attend(
        head.logits.where(members, logits[..., of_token].where(estimated[:, of_token], _NEVER)),
    )
    return Outcome(outputs, tokens_read(members), estimated.sum(1).double().mean().item())


def _members(tokens: Tensor, of_token: Tensor, clusters: int) -> Tensor:
    """How many of the tokens [t, N] bool each cluster has, [t, C] float32."""
    return torch.zeros(len(tokens), clusters).index_add_(1, of_token, tokens.float())


def _largest(scores: Tensor, count: int) -> Tensor:
    """[t, C] bool: the `count` largest of scores [t, C]; ties go to the smaller index."""
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def _logits_of_the_rest(head: ExactHead, retrieved: Tensor, of_token: Tensor, left: Tensor) -> Tensor:
    """Logits [g, t, C] of the mean keys of those members that are not retrieved [t, N]; left [t, C] counts them.

    Of no meaning where none is left. Linear: the logit of a mean is the mean of the logits.
    """
    rest = head.logits.masked_fill(retrieved, 0)
    sums = rest.new_zeros(*rest.shape[:2], left.shape[1]).index_add_(2, of_token, rest)
    return sums / left.clamp(min=1)


def _by_rounded_means(clusters: Clusters, weights: Tensor, left: Tensor) -> Tensor:
    """What outputs [g, t, d] change by if the clusters' mean values are bfloat16; weights [g, t, N] of the tokens that
    clusters stand for. The rounding of a mean counts for all members, the exact values of the lost ones are taken off.
    """
    sizes = clusters.sizes[0].float()
    means = clusters.value_sums[0] / sizes.clamp(min=1)[:, None]
    of_cluster = weights.new_zeros(*weights.shape[:2], len(sizes))
    of_cluster.index_add_(2, clusters.assignment[0].long(), weights)
    return (of_cluster * sizes / left.clamp(min=1)) @ (means.bfloat16().float() - means)


def _draw(logits: Tensor, log_u: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """The tokens [g, t, N] bool of the `draws` largest priorities and the next one's priority [g, t, 1], -inf where
    there is none. Logits of -inf are never drawn."""
    priorities = logits - log_u
    if draws < logits.shape[-1]:
        threshold = priorities.topk(draws + 1, -1).values[..., -1:]
    else:
        threshold = torch.full_like(priorities[..., :1], _NEVER)
    return priorities > threshold, threshold


def _over_inclusion(logits: Tensor, drawn: Tensor, threshold: Tensor) -> Tensor:
    """Logits less the log of the probability that any head of the group draws the token; -inf where none did."""
    log_probability = (logits - threshold).amax(0).clamp(max=0)
    return (logits - log_probability).where(drawn.any(0), _NEVER)
