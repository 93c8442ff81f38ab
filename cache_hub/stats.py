"""What a cache did: tokens attended, keys scored, bytes moved, seconds by stage, and recall and mass when asked for."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Agreement:
    """Sums over decode steps of how well retrieval agreed with an exact scan, for each layer and query head.

    recall: |found and exact top-k| / k, over the indexed keys. mass: softmax mass of the tokens attended to, the static
    ones included. exact_mass: the same, had the exact top-k been retrieved. scored: keys and centroids that the search
    scored. All [layers, heads] float64 sums; steps [layers] int64 counts sequences x steps.
    """

    recall: Tensor
    mass: Tensor
    exact_mass: Tensor
    scored: Tensor
    steps: Tensor

    @classmethod
    def zeros(cls, layers: int, heads: int) -> Agreement:
        table = lambda: torch.zeros(layers, heads, dtype=torch.float64)  # noqa: E731
        return cls(table(), table(), table(), table(), torch.zeros(layers, dtype=torch.int64))

    def add(self, layer: int, recall: Tensor, mass: Tensor, exact_mass: Tensor, scored: Tensor) -> None:
        """Adds one step of one layer; every tensor [sequences, heads]."""
        self.recall[layer] += recall.double().sum(0).cpu()
        self.mass[layer] += mass.double().sum(0).cpu()
        self.exact_mass[layer] += exact_mass.double().sum(0).cpu()
        self.scored[layer] += scored.double().sum(0).cpu()
        self.steps[layer] += len(recall)

    def mean(self, table: Tensor) -> Tensor:
        """[layers, heads] means of one of the sums."""
        return table / self.steps.clamp(min=1)[:, None]


@dataclass
class CacheStats:
    """Totals since the cache was made; shares are of the tokens in the cache at that step.

    Sums run over decode steps, layers, sequences and kv heads (tokens attended, clusters estimated) or query heads
    (keys scored). Tokens that only an estimate stands for are not attended. scored_bytes: of the keys and centroids
    scored, in the type in which they are read, as if no two query heads shared one.
    """

    attended: int = 0
    attended_of: int = 0
    estimated: int = 0
    scored: int = 0
    scored_bytes: int = 0
    scored_of: int = 0
    bytes_moved: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    notes: list[str] = field(default_factory=list)
    agreement: Agreement | None = None

    @property
    def attended_share(self) -> float:
        """Tokens attended to per kv head and step as a share of the context; 1 before the first step."""
        return self.attended / self.attended_of if self.attended_of else 1.0

    @property
    def estimated_share(self) -> float:
        """Clusters that stand for tokens per kv head and step as a share of the context."""
        return self.estimated / self.attended_of if self.attended_of else 0.0

    @property
    def scored_share(self) -> float:
        """Keys and centroids scored by the search per query head and step as a share of the context."""
        return self.scored / self.scored_of if self.scored_of else 0.0

    def note(self, text: str) -> None:
        """Keeps a remark once, however many layers make it."""
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall seconds of the block to a stage; on a GPU, of what the CPU waited for."""
        begin = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begin


class DeviceCountedStats(CacheStats):
    """CacheStats whose tokens attended to are partly counted by devices: what they counted is waited for when
    `attended` or `bytes_moved` is asked for.

    counters: tensors whose sum are tokens, of each of which row_bytes were read from CPU memory. known_attended,
    known_moved: the rest, to which the host adds without a wait.
    """

    def __init__(self, counters: list[Tensor], row_bytes: int, **totals: Any) -> None:
        self._counters, self._row_bytes = counters, row_bytes
        super().__init__(**totals)

    @property
    def _counted(self) -> int:
        return sum(int(counter.sum()) for counter in self._counters)

    @property
    def attended(self) -> int:
        return self.known_attended + self._counted

    @attended.setter
    def attended(self, total: int) -> None:
        self.known_attended = total - self._counted

    @property
    def bytes_moved(self) -> int:
        return self.known_moved + self._row_bytes * self._counted

    @bytes_moved.setter
    def bytes_moved(self, total: int) -> None:
        self.known_moved = total - self._row_bytes * self._counted


class ScanCountedStats(DeviceCountedStats):
    """DeviceCountedStats whose keys scored are partly counted by devices, too; waited for when `scored` or
    `scored_bytes` is asked for.

    scanned: tensors whose sum are keys, each scored by `group` query heads, of key_bytes. known_scored,
    known_scored_bytes: the rest, to which the host adds without a wait.
    """

    def __init__(
        self, scanned: list[Tensor], group: int, key_bytes: int, counters: list[Tensor], row_bytes: int, **totals: Any
    ) -> None:
        self._scanned, self._group, self._key_bytes = scanned, group, key_bytes
        super().__init__(counters, row_bytes, **totals)

    @property
    def _scored(self) -> int:
        return self._group * sum(int(counter.sum()) for counter in self._scanned)

    @property
    def scored(self) -> int:
        return self.known_scored + self._scored

    @scored.setter
    def scored(self, total: int) -> None:
        self.known_scored = total - self._scored

    @property
    def scored_bytes(self) -> int:
        return self.known_scored_bytes + self._key_bytes * self._scored

    @scored_bytes.setter
    def scored_bytes(self, total: int) -> None:
        self.known_scored_bytes = total - self._key_bytes * self._scored
