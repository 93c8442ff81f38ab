"""Batches of training sequences, and the processes that make them ahead of their use."""

from __future__ import annotations

import random
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .families import FAMILIES
from .materials import Materials
from .schedule import phase_at
from .sequences import Sequence
from .settings import TrainSettings
from .wording import choose_style

_FIRST_WEIGHT = 1.5
_ONLY_WEIGHT = 1.6


@dataclass(frozen=True)
class Order:
    """Which batch to make: `rows` sequences of at most `length` tokens, families by their shares."""

    seed: str
    length: int
    rows: int
    families: dict[str, float]


@dataclass(frozen=True)
class Batch:
    """ids [B, L] int32, filled up with the end token. For each of the N answer tokens: `positions` int64, the place in
    ids.flatten() whose output predicts it, `targets` int64, `weights` float32 of its loss, and `owners` int64, which of
    the `tasks` (one an answer) it belongs to. The first answer of a sequence, and an only one, weigh more."""

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    owners: np.ndarray
    tasks: list[str]


def plan(settings: TrainSettings, step: int, progress: float) -> Order:
    """The batch of a step, its length drawn by the schedule's shares. The same for the same arguments."""
    rng = random.Random(f"{settings.seed}/{step}")
    phase = phase_at(progress)
    lengths = phase.lengths_up_to(settings.max_length)
    length = rng.choices(list(lengths), list(lengths.values()))[0]
    rows = settings.tokens_per_step // length
    return Order(f"{settings.seed}/{step}/sequences", length, rows, phase.families_at(length))


def make_sequence(materials: Materials, rng: random.Random, length: int, families: dict[str, float]) -> Sequence:
    """A sequence of at most `length` tokens, of a random family and style."""
    while True:
        family = rng.choices(list(families), list(families.values()))[0]
        sequence = FAMILIES[family](materials, rng, length, choose_style(rng))
        if sequence is not None:
            return sequence


def make_batch(materials: Materials, order: Order) -> Batch:
    """The batch of an order."""
    rng = random.Random(order.seed)
    return pack(
        [make_sequence(materials, rng, order.length, order.families) for _ in range(order.rows)],
        order.length,
        materials.end_id,
    )


def pack(sequences: list[Sequence], length: int, end_id: int) -> Batch:
    """Sequences as one batch; the loss is taken on their answers alone."""
    ids = np.full((len(sequences), length), end_id, dtype=np.int32)
    places, weights, owners = [], [], []
    tasks: list[str] = []
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = sequence.ids
        for number, answer in enumerate(sequence.answers):
            size = answer.end - answer.start
            weight = (_FIRST_WEIGHT if number == 0 else 1.0) * (_ONLY_WEIGHT if len(sequence.answers) == 1 else 1.0)
            places.append(row * length + np.arange(answer.start, answer.end))
            weights.append(np.full(size, weight, dtype=np.float32))
            owners.append(np.full(size, len(tasks)))
            tasks.append(answer.task)
    at = np.concatenate(places)
    return Batch(
        ids, at - 1, ids.flatten()[at].astype(np.int64), np.concatenate(weights), np.concatenate(owners), tasks
    )


class BatchFeed:
    """Batches in the order in which they were asked for, made by `workers` processes, or on the spot with none."""

    def __init__(self, tokenizer: Path, corpus: Path, workers: int) -> None:
        if workers < 0:
            raise ValueError(f"workers: got {workers}, allowed: 0 or more")
        self._materials = Materials.load(tokenizer, corpus)
        self._waiting: deque[Order | Future[Batch]] = deque()
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            # Not fork: the training process has threads and, later, a GPU.
            context = get_context("forkserver")
            self._pool = ProcessPoolExecutor(workers, context, _open_materials, (tokenizer, corpus))

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, order: Order) -> None:
        self._waiting.append(order if self._pool is None else self._pool.submit(_make_ordered, order))

    def take(self) -> Batch:
        """The batch asked for longest ago. What went wrong in its making is raised here."""
        waiting = self._waiting.popleft()
        return make_batch(self._materials, waiting) if isinstance(waiting, Order) else waiting.result()

    def close(self) -> None:
        """Ends the processes; what is still being made is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_opened: list[Materials] = []


def _open_materials(tokenizer: Path, corpus: Path) -> None:
    _opened.append(Materials.load(tokenizer, corpus))


def _make_ordered(order: Order) -> Batch:
    return make_batch(_opened[0], order)
