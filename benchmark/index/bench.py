"""Goes through traces and configurations: one build for all rows that differ in search alone, a row when it is done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cache_hub import build_key
from config import RetroInferConfig

from ..results import environment
from .drive import ask, fill, go_over
from .measures import LayerResult, layer_result, summarize
from .reference import exact_attention
from .results import ResultsFile, row_key
from .sweeps import Configuration
from .traces import TraceFolder


@dataclass(frozen=True)
class _Row:
    """A configuration, complete for one trace."""

    configuration: Configuration
    settings: RetroInferConfig
    key: str

    @property
    def build_key(self) -> str:
        """Equal for rows that one filled cache can serve."""
        strategy = self.configuration.strategy
        return build_key(strategy, self.settings)


class Bench:
    """device and dtype of the caches; metrics as in measures.METRICS; rows go to `output`."""

    def __init__(self, device: str, dtype: torch.dtype, metrics: Sequence[str], output: ResultsFile) -> None:
        self.device, self.dtype, self.metrics, self.output = device, dtype, metrics, output
        self.diagnose = "recall" in metrics or "mass" in metrics

    def run(self, folders: Sequence[TraceFolder], configurations: Sequence[Configuration], base: Sequence[str]) -> None:
        """Measures every configuration on every trace that `output` has no row of.

        base: "section.key=value" for all rows. Raises ConfigError before any work for settings that are not allowed,
        ValueError for two traces or two rows that are the same.
        """
        planned = [(folder, self._plan(folder, configurations, base)) for folder in folders]
        digests = [folder.digest for folder in folders]
        if len(set(digests)) < len(digests):
            raise ValueError("traces: the same trace is given twice, allowed: once")
        where = environment()
        missing = [(folder, [row for row in rows if row.key not in self.output]) for folder, rows in planned]
        total = sum(len(folder.files) * len(rows) for folder, rows in missing)
        with tqdm(total=total, unit="layer", disable=None) as bar:
            for folder, rows in missing:
                exact: dict[int, Tensor] = {}
                groups: dict[str, list[_Row]] = defaultdict(list)
                for row in rows:
                    groups[row.build_key].append(row)
                for group in groups.values():
                    for row, measured in zip(group, self._measure(folder, group, exact, bar), strict=True):
                        self.output.add({**_described(row, folder), **measured, "environment": where})

    def _plan(self, folder: TraceFolder, configurations: Sequence[Configuration], base: Sequence[str]) -> list[_Row]:
        model = str(folder.info.get("protocol", {}).get("model", "unknown"))
        rows: list[_Row] = []
        for configuration in configurations:
            settings = configuration.settings(model, folder.tokens, base)
            row = _Row(configuration, settings, row_key(configuration.strategy, settings, folder.digest))
            for other in rows:
                if other.key == row.key:
                    raise ValueError(f"{row.configuration.name} and {other.configuration.name} are the same settings")
            rows.append(row)
        return rows

    def _measure(
        self, folder: TraceFolder, rows: Sequence[_Row], exact: dict[int, Tensor], bar: tqdm
    ) -> list[dict[str, Any]]:
        """The measured parts of rows that share a build. exact: outputs of full attention by layer, filled here."""
        results: list[list[LayerResult]] = [[] for _ in rows]
        first = rows[0]
        for layer in folder.files:
            bar.set_description(f"{folder.name}: {first.configuration.name}")
            trace = folder.load(layer)
            if "output_error" in self.metrics and layer not in exact:
                exact[layer] = exact_attention(trace)
            cache, seconds = fill(
                first.configuration.strategy, first.settings, trace, self.device, self.dtype, self.diagnose
            )
            built = dict(cache.stats.seconds)
            for row, layers in zip(rows, results, strict=True):
                bar.set_description(f"{folder.name}: {row.configuration.name}")
                if row is not first:
                    go_over(cache, row.settings)
                stages = dict(cache.stats.seconds)
                mine = seconds + stages.get("build", 0.0) - built.get("build", 0.0)
                layers.append(layer_result(trace, ask(cache, trace), exact.get(layer), cache, mine, stages))
                bar.update()
            del cache
        shape = trace.tests.shape
        asked = {"tokens": folder.tokens, "queries": shape[2], "held_out": trace.held_out}
        sizes = {"kv_heads": shape[0], "group": shape[1], "head_dim": shape[3], "layers": list(folder.files)}
        return [{**asked, **sizes, **summarize(layers, shape, self.metrics)} for layers in results]


def _described(row: _Row, folder: TraceFolder) -> dict[str, Any]:
    return {
        "key": row.key,
        "name": row.configuration.name,
        "strategy": row.configuration.strategy,
        "set": row.configuration.set,
        "trace": {"folder": folder.name, "digest": folder.digest, **folder.info.get("protocol", {})},
        "settings": row.settings.model_dump(),
    }
