"""Which configurations to measure: strategies by name, or the rows of a sweep file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_hub import STRATEGIES
from config import ConfigError, RetroInferConfig, add_config_args, config_from_args

_KEYS = {"name", "strategy", "set"}


@dataclass(frozen=True)
class Configuration:
    """A strategy and the configuration keys it changes, {"attention_aware_graph.ef_search": 120}."""

    name: str
    strategy: str
    set: dict[str, Any] = field(default_factory=dict)

    def settings(self, model_name: str, tokens: int, base: Sequence[str]) -> RetroInferConfig:
        """The complete configuration for a prompt of so many tokens: the model's file, then `base`, the --set of the
        command line, then this row's. Raises ConfigError, naming the row, for an unknown key or a value not allowed."""
        parser = argparse.ArgumentParser()
        add_config_args(parser)
        mine = [f"{key}={json.dumps(value)}" for key, value in self.set.items()]
        flags = [word for setting in (*base, *mine) for word in ("--set", setting)]
        args = parser.parse_args(["--attn_type", self.strategy, *flags])
        try:
            return RetroInferConfig(**config_from_args(args, model_name, tokens)["RetroInfer"])
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None


def choose(strategies: Sequence[str] | None, sweep: Path | None) -> list[Configuration]:
    """One configuration for each strategy without a sweep; else the sweep's rows, of these strategies if any are named.

    Raises ValueError where neither is given, for an unknown strategy, and as read_sweep.
    """
    for strategy in strategies or ():
        _check_strategy("strategies", strategy)
    if sweep is None:
        if not strategies:
            raise ValueError(f"strategies: got none and no sweep, allowed: some of {', '.join(STRATEGIES)}")
        return [Configuration(strategy, strategy) for strategy in dict.fromkeys(strategies)]
    rows = read_sweep(sweep)
    for strategy in strategies or ():
        if not any(row.strategy == strategy for row in rows):
            raise ValueError(f"strategies: {sweep.name} has no row of {strategy}")
    return [row for row in rows if not strategies or row.strategy in strategies]


def read_sweep(path: Path) -> list[Configuration]:
    """The rows of a sweep file, a JSON list of {"name", "strategy", "set": {"section.key": value}}.

    Raises FileNotFoundError, and ValueError naming file and row for what is malformed, an unknown strategy, a repeated
    name.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: got {type(rows).__name__}, allowed: a list of rows, one or more")
    found: list[Configuration] = []
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict) or not {"name", "strategy"} <= row.keys() <= _KEYS:
            raise ValueError(f'{where}: got {row!r}, allowed: {{"name", "strategy", "set"}}')
        if not isinstance(row["name"], str) or not isinstance(row.get("set", {}), dict):
            raise ValueError(f"{where}: name must be text, set an object, got {row!r}")
        _check_strategy(where, row["strategy"])
        if row["name"] in (other.name for other in found):
            raise ValueError(f"{where}: the name {row['name']!r} is there twice, allowed: once")
        found.append(Configuration(**row))
    return found


def _check_strategy(where: str, strategy: Any) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"{where}: strategy: got {strategy!r}, allowed: {', '.join(STRATEGIES)}")
