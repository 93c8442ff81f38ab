"""What torchrun and accelerate say about this process, one of several that share the work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """This process's share of all samples: every `world`-th from `rank` on. `local_world` processes share a machine."""

    rank: int = 0
    world: int = 1
    local_world: int = 1

    @classmethod
    def of_launcher(cls) -> Shard:
        """From RANK, WORLD_SIZE and LOCAL_WORLD_SIZE; everything where nothing launched us."""
        return cls(*(int(os.environ.get(name, alone)) for name, alone in _VARIABLES.items()))

    def share(self, items: Sequence[T], before: int) -> list[T]:
        """The items of this process; `before` items of the same run were shared out ahead of them."""
        return [item for i, item in enumerate(items, before) if i % self.world == self.rank]


_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}


def default_device() -> str:
    """The GPU of this process, by LOCAL_RANK round the machine's GPUs, or "cpu" where there is none."""
    gpus = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu"
