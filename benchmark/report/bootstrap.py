"""Percentile bootstrap over the samples of a task, paired: all strategies are resampled alike (Efron and Tibshirani,
An Introduction to the Bootstrap, 1993, chapter 13)."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 2025
LEVEL = 0.95
_BLOCK = 1000


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


def resampled_means(scores: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Means of RESAMPLES draws of n rows with replacement, [RESAMPLES, c], of scores [n, c].

    A draw takes the same rows of every column, so that differences of columns are paired. It is made from `name` and
    SEED.
    """
    count, columns = scores.shape
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    # Taking off a row first keeps columns that are constant, or a constant apart, exactly so.
    shifted = scores - scores[0]
    means = np.empty((RESAMPLES, columns))
    for start in range(0, RESAMPLES, _BLOCK):
        drawn = rng.integers(0, count, size=(_BLOCK, count)) + count * np.arange(_BLOCK)[:, None]
        times = np.bincount(drawn.ravel(), minlength=_BLOCK * count).reshape(_BLOCK, count)
        means[start : start + _BLOCK] = times @ shifted / count + scores[0]
    return means


def interval(value: float, draws: NDArray[np.float64]) -> Interval:
    """The central LEVEL of draws [RESAMPLES] around an estimate, rounded where float64 ends to mean anything."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(*(round(float(end), 9) + 0.0 for end in (value, low, high)))
