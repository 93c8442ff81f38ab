"""A run's state in one safetensors file: factors, optimiser moments, and what was spent, as JSON in its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .adapter import Adapter, save_whole
from .settings import TrainSettings

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class Spent:
    """What a run has used so far."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_checkpoint(
    folder: Path, adapter: Adapter, optimiser: torch.optim.Optimizer, settings: TrainSettings, spent: Spent
) -> None:
    """Replaces the checkpoint in `folder`, whole or not at all."""
    states = {}
    for name, parameter in adapter.named_parameters():
        states[name] = parameter.detach().cpu()
        states |= {f"{name}.{key}": value.cpu() for key, value in optimiser.state[parameter].items()}
    metadata = {"settings": json.dumps(asdict(settings)), "spent": json.dumps(asdict(spent))}
    save_whole(states, folder / CHECKPOINT, metadata)


def load_checkpoint(folder: Path, adapter: Adapter, optimiser: torch.optim.Optimizer, settings: TrainSettings) -> Spent:
    """Puts the checkpoint's state into adapter and optimiser; nothing spent where there is no checkpoint.

    Raises ValueError, naming the settings, where it is of a run with others.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return Spent()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        _compare(path, json.loads(metadata["settings"]), asdict(settings))
        states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    saved: dict[int, dict[str, torch.Tensor]] = {}
    for index, (name, parameter) in enumerate(adapter.named_parameters()):
        with torch.no_grad():
            parameter.copy_(states.pop(name))
        saved[index] = {key: states.pop(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
    optimiser.load_state_dict({**optimiser.state_dict(), "state": saved})
    return Spent(**json.loads(metadata["spent"]))


def _compare(path: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [key for key in now if earlier.get(key) != now[key]]
    if differing:
        told = "; ".join(f"{key}: {earlier.get(key)} there, {now[key]} now" for key in differing)
        raise ValueError(f"{path} is of a run with other settings ({told}); give another folder")
