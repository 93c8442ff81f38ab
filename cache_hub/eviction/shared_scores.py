"""Scores that several caches of one prefill need, made once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from .cache import EvictionCache
from .scorer import Scorer


@contextmanager
def shared_scores(caches: Iterable[object]) -> Iterator[None]:
    """While a prefill fills the caches, those that evict by equal scorers, such as with several budgets, score each
    layer's prompt once. The first of them to be filled does, and its statistics have the seconds."""
    evicting = [cache for cache in caches if isinstance(cache, EvictionCache)]
    users = Counter(cache.scorer for cache in evicting)
    remembered = {scorer: _Remembered(scorer, count) for scorer, count in users.items() if count > 1}
    for cache in evicting:
        cache.make_scores = remembered.get(cache.scorer, cache.scorer.score)
    try:
        yield
    finally:
        for cache in evicting:
            cache.make_scores = cache.scorer.score


class _Remembered:
    """The scores of the latest prompt states, until all users have had them. Holds the states for so long, so that no
    other tensor can lie at their place."""

    def __init__(self, scorer: Scorer, users: int) -> None:
        self._scorer, self._users, self._asked = scorer, users, 0
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        latest = self._latest
        if latest is None or not (_same(query, latest[0]) and _same(key, latest[1])):
            self._latest = None  # frees what another layer left
            latest = self._latest = query, key, self._scorer.score(query, key)
            self._asked = 0
        self._asked += 1
        if self._asked == self._users:
            self._latest = None
        return latest[2]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of the same numbers, of which prompt states are never written to."""
    return (
        all(getattr(one, name)() == getattr(other, name)() for name in ("data_ptr", "size", "stride"))
        and one.dtype == other.dtype
    )
