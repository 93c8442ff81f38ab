"""The wave index in plain numpy float64, written from its definition, one kv head at a time."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def cluster(keys: Array, values: Array, segments: int, centroids: int, iterations: int = 10) -> tuple[Array, ...]:
    """keys, values [n, d] -> centroids [c, d], sizes [c], value_sums [c, d], assignment [n]."""
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    n, mean = len(keys), keys.mean(0)
    points = keys - mean
    current = np.array([points[int(np.floor((i + 0.5) * n / centroids))] for i in range(centroids)])
    length, each = n // segments, centroids // segments
    for _ in range(iterations - 1):
        for segment in range(segments):
            rows = points[segment * length : (segment + 1) * length]
            own = current[segment * each : (segment + 1) * each]
            nearest = (rows @ own.T).argmax(1)
            for i in range(each):
                if (nearest == i).any():
                    centre = rows[nearest == i].mean(0)
                    own[i] = centre / max(np.linalg.norm(centre), 1e-12)
    return means(keys, values, (points @ current.T).argmax(1), centroids, current + mean)


def means(
    keys: Array, values: Array, assignment: Array, centroids: int, empty: Array | None = None
) -> tuple[Array, ...]:
    """What `cluster` returns, for keys [n, d] in the clusters `assignment` [n]; empty [c, d]: centroids of those that
    nothing is in."""
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    current = np.zeros((centroids, keys.shape[1])) if empty is None else empty.copy()
    sizes = np.zeros(centroids, int)
    value_sums = np.zeros_like(current)
    for i in range(centroids):
        members = assignment == i
        sizes[i] = members.sum()
        value_sums[i] = values[members].sum(0)
        if sizes[i]:
            current[i] = keys[members].mean(0)
    return current, sizes, value_sums, assignment


def selection(queries: Array, clusters: list[tuple[Array, ...]], retrieved: int, estimated: int) -> tuple[Array, Array]:
    """Numbers of the clusters that queries [g, d] of one group retrieve and estimate, over all clusterings in turn."""
    centroids = np.concatenate([entry[0] for entry in clusters])
    sizes = np.concatenate([entry[1] for entry in clusters])
    logits = queries.astype(np.float64) @ centroids.T / np.sqrt(queries.shape[1])
    weights = np.exp(logits - logits.max(1, keepdims=True))
    score = (weights / weights.sum(1, keepdims=True)).sum(0)
    score[sizes == 0] = -1
    order = np.argsort(-score, kind="stable")
    return order[:retrieved], order[retrieved : retrieved + estimated]


def attention(
    queries: Array,
    steady: tuple[Array, Array],
    indexed: list[tuple[Array, Array]],
    clusters: list[tuple[Array, ...]],
    retrieved: int,
    estimated: int,
) -> tuple[Array, Array]:
    """Outputs [g, d] and masses [g] (the softmax's denominator, logits not shifted) of one kv head's queries [g, d].

    steady: keys, values attended exactly; indexed: keys, values of each run of tokens that was clustered, with its
    entry of clusters as `cluster` returns it.
    """
    exact, tail = selection(queries, clusters, retrieved, estimated)
    keys, values = [steady[0]], [steady[1]]
    first = 0
    for (run_keys, run_values), entry in zip(indexed, clusters, strict=True):
        wanted = np.isin(entry[3] + first, exact)
        keys.append(run_keys[wanted])
        values.append(run_values[wanted])
        first += len(entry[1])
    all_keys = np.concatenate(keys).astype(np.float64)
    all_values = np.concatenate(values).astype(np.float64)
    centroids = np.concatenate([entry[0] for entry in clusters])
    sizes = np.concatenate([entry[1] for entry in clusters])
    value_sums = np.concatenate([entry[2] for entry in clusters])
    outs, masses = [], []
    for query in queries.astype(np.float64):
        weights = np.exp(all_keys @ query / np.sqrt(len(query)))
        cluster_weights = np.exp(centroids[tail] @ query / np.sqrt(len(query)))
        cluster_weights[sizes[tail] == 0] = 0
        mass = weights.sum() + (sizes[tail] * cluster_weights).sum()
        outs.append((weights @ all_values + cluster_weights @ value_sums[tail]) / mass)
        masses.append(mass)
    return np.array(outs), np.array(masses)
