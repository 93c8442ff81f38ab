"""Result files as other projects' scripts expect them, made from the runner's records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.results import write_json, write_text

from .prompting import format_prompt
from .scoring import score_buckets, score_dataset

Record = Mapping[str, Any]


def write_upstream(folder: Path, records: Mapping[str, Sequence[Record]], extended: bool = False) -> dict[str, Any]:
    """THUDM/LongBench's files: <dataset>.jsonl with {pred, answers, all_classes, length} a line, and result.json with
    {dataset: score}, for LongBench-E {dataset: {bucket: score}}, NaN where a bucket is empty. Returns result.json's
    content. Upstream finds them with folder = pred/<model>, RetroInfer with results/pred[_e]/<model>/<strategy>.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores: dict[str, Any] = {}
    for dataset, lines in records.items():
        told = [
            {
                "pred": line["pred"],
                "answers": line["expected"],
                "all_classes": line["all_classes"],
                "length": line["length"],
            }
            for line in lines
        ]
        write_text(folder / f"{dataset}.jsonl", _lines(told))
        scores[dataset] = score_buckets(dataset, lines) if extended else score_dataset(dataset, lines)
    write_json(folder / "result.json", scores)
    return scores


def write_kvcache_factory(
    folder: Path,
    method: str,
    records: Mapping[str, Sequence[Record]],
    sources: Mapping[str, Sequence[Record]],
) -> None:
    """KVCache-Factory's <folder>/<dataset>/<method>.json, where folder is <save_dir>/<model>_<budget>.

    A line a sample: {prompt, input, context, answers, pred, length, dataset, language, all_classes, _id}; prompt is the
    formatted one, before truncation and template. sources: LongBench's records that the samples were made of.
    """
    for dataset, lines in records.items():
        by_id = {source["_id"]: source for source in sources[dataset]}
        told = []
        for line in lines:
            source = by_id[line["id"]]
            told.append(
                {
                    "prompt": format_prompt(dataset, source),
                    **{key: source[key] for key in ("input", "context", "answers")},
                    "pred": line["pred"],
                    **{key: source[key] for key in ("length", "dataset", "language", "all_classes", "_id")},
                }
            )
        (folder / dataset).mkdir(parents=True, exist_ok=True)
        write_text(folder / dataset / f"{method}.json", _lines(told))


def _lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
