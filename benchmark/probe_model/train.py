"""Trains the default model's 64K adapter. README.md beside this file says what is needed and what came out.

python -m benchmark.probe_model.train --corpus corpus.json.xz --output adapter
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model_hub.embedded import fetch_embedded

from .batches import BatchFeed
from .model import ProbeModel
from .settings import TrainSettings
from .trainer import Trainer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    default = TrainSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="file of prepare_corpus")
    parser.add_argument("--output", type=Path, required=True, help="folder; its checkpoint, if any, is gone on from")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=default.seconds, help="length of the run (%(default)s)")
    length.add_argument(
        "--steps", type=int, default=0, help="instead: schedule and rate by steps, not by time, so that runs repeat"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of the data")
    parser.add_argument("--tokens_per_step", type=int, default=default.tokens_per_step, help="(%(default)s)")
    parser.add_argument("--max_length", type=int, default=default.max_length, help="leave out longer (%(default)s)")
    parser.add_argument("--workers", type=int, default=10, help="processes that make data (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def load_base(folder: Path, settings: TrainSettings, device: torch.device) -> ProbeModel:
    """The default model with the adapter's rotary base; bfloat16 on a GPU, float32 on a CPU."""
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "default", "rope_theta": settings.rope_theta}
    config.max_position_embeddings = settings.max_positions
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True)
    return ProbeModel(model, device, dtype)


def prepare(args: argparse.Namespace) -> tuple[Trainer, BatchFeed]:
    """All that training needs, checked. Raises FileNotFoundError, ModuleNotFoundError, RuntimeError or ValueError for
    what is missing or wrong."""
    settings = TrainSettings(
        seconds=0 if args.steps else args.seconds,
        steps=args.steps,
        seed=args.seed,
        tokens_per_step=args.tokens_per_step,
        max_length=args.max_length,
    )
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if args.device not in devices:
        raise ValueError(f"device: got {args.device!r}, allowed here: {', '.join(devices)}")
    device = torch.device(args.device)
    folder = fetch_embedded()
    feed = BatchFeed(folder / "tokenizer.json", args.corpus, args.workers)
    args.output.mkdir(parents=True, exist_ok=True)
    return Trainer(load_base(folder, settings, device), settings, args.output), feed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        trainer, feed = prepare(args)
    except (FileNotFoundError, ModuleNotFoundError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        trainer.run(feed)
    finally:
        feed.close()
    print(trainer.meter.table())
    trainer.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
