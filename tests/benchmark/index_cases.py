"""Synthetic traces for the tests of benchmark.index."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.index.traces import PREDICTED, file_name


def random_head(
    n: int = 300, group: int = 3, dim: int = 32, tests: int = 4, seed: int = 0, predicted: bool = False
) -> dict[str, Any]:
    """The arrays of one file; keys around a few directions, so that attention is neither flat nor on one token.
    predicted: with q_predicted, which has nothing of the queries."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, dim))
    keys = centres[rng.integers(0, 8, n)] + rng.normal(size=(n, dim))
    draw = lambda count: centres[rng.integers(0, 8, (group, count))] * 2 + rng.normal(size=(group, count, dim))  # noqa: E731
    arrays = {"q": draw(n), "k": keys, "v": rng.normal(size=(n, dim)), "q_decode": draw(tests)}
    if predicted:
        arrays["q_predicted"] = draw(min(PREDICTED, n) + tests)
    return {name: array.astype(np.float16) for name, array in arrays.items()}


def write_trace(
    folder: Path,
    layers: tuple[int, ...] = (0, 2),
    kv_heads: int = 2,
    info: bool = True,
    predicted: Collection[int] = (),
    **shape: int,
) -> Path:
    """A folder of random heads, with a trace.json as the extraction leaves it if `info`; predicted: the layers that
    have q_predicted."""
    folder.mkdir(parents=True)
    for layer in layers:
        for head in range(kv_heads):
            arrays = random_head(seed=100 * layer + head, predicted=layer in predicted, **shape)
            np.savez(folder / file_name(layer, head), **arrays)
    if info:
        protocol = {"model": "tiny", "prompt": {"task": folder.name, "context_len": 512}}
        told = {"protocol": protocol, "layers": list(layers), "kv_heads": kv_heads, "decoded": [1]}
        (folder / "trace.json").write_text(json.dumps(told))
    return folder


def attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Softmax attention of queries [m, d] over keys and values [n, d], [m, d] float64."""
    logits = queries.astype(np.float64) @ keys.astype(np.float64).T / keys.shape[1] ** 0.5
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ values.astype(np.float64)
