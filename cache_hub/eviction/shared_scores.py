"""Scores that several caches of one prefill need, made once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .cache import EvictionCache
from .scorer import Scorer


def share_scores(caches: Iterable[object]) -> None:
    """Lets those of the caches that evict by equal scorers, such as with several budgets, score each layer's prompt
    once. The first of them to be filled does, and its statistics have the seconds; the caches fill as they would alone,
    layer after layer."""
    scorers: dict[Scorer, _Remembered] = {}
    for cache in caches:
        if isinstance(cache, EvictionCache):
            cache.make_scores = scorers.setdefault(cache.scorer, _Remembered(cache.scorer))


class _Remembered:
    """The scores of the latest prompt states. Holds these, so that no other tensor can lie at their place."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        if self._latest is None or not (_same(query, self._latest[0]) and _same(key, self._latest[1])):
            self._latest = query, key, self._scorer.score(query, key)
        return self._latest[2]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of the same numbers, of which prompt states are never written to."""
    return (
        all(getattr(one, name)() == getattr(other, name)() for name in ("data_ptr", "size", "stride"))
        and one.dtype == other.dtype
    )
