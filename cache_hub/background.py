"""One thread that works behind its caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class BackgroundWork:
    """Pieces of work that a thread of its own does one after the other, at most `most` of them begun or waiting.

    The thread is there from the first piece to `finish`. Work that is dropped without that is done, and the thread
    ends. Torch's inference mode is the caller's.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._pool: ThreadPoolExecutor | None = None
        self._begun: deque[Future[None]] = deque()

    def put(self, work: Callable[[], None]) -> None:
        """Leaves `work` to the thread, once fewer than `most` pieces are left. Raises the error of an earlier one."""
        while self._begun and (len(self._begun) >= self._most or self._begun[0].done()):
            self._begun.popleft().result()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "background")
        self._begun.append(self._pool.submit(_run, work, torch.is_inference_mode_enabled()))

    @property
    def pending(self) -> bool:
        """Whether there is work that nobody has waited for."""
        return bool(self._begun)

    def finish(self) -> None:
        """Waits for all work; then the thread is gone. Raises the first error, behind which no piece is begun."""
        try:
            while self._begun:
                self._begun.popleft().result()
        finally:
            self._begun.clear()
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None


def _run(work: Callable[[], None], inference: bool) -> None:
    with torch.inference_mode(inference):
        work()
