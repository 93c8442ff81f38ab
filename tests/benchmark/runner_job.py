"""The work that test_runner.py gives the runner; as a program: does it and dies by SIGKILL after some samples."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmark import runner
from benchmark.runner import Sample, Task, run_tasks
from config import generate_config
from model_hub import LLM, load_model

STRATEGIES = ["full", "flat", "attention_aware_graph"]


class Bytes:
    """Tokenizer of one token a byte."""

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"input_ids": list(text.encode())})

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def tasks(count: int = 5) -> list[Task]:
    def samples(name: str) -> list[Sample]:
        lengths = [150, 200, 150, 170, 150]
        return [Sample(str(i), f"{name} {i} " + "x" * lengths[i], ["1"], 4, extra={"kind": name}) for i in range(count)]

    def score(records: list[dict[str, Any]]) -> list[float]:
        return [100.0 * len(record["pred"].split()) / 4 for record in records]

    return [Task("one", samples("a"), score), Task("two", samples("b"), score)]


def run(llm: LLM, folder: Path, **options: Any) -> None:
    config = generate_config("tiny", 300, "RetroInfer", overrides={"attention_aware_graph.top_k": 20})
    run_tasks(llm, Bytes(), options.pop("tasks", tasks()), STRATEGIES, config, folder, {"seed": 1}, **options)


def tiny_model(folder: Path) -> Path:
    """Saves a random model of 256 tokens there."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    config = AutoConfig.for_model(
        "llama", **shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(folder: Path) -> LLM:
    model = load_model(str(folder), 1024, "fp32", "cpu")
    model.progress = False
    return model


def main(model: str, folder: str, samples_done: str) -> None:
    append, left = runner._append, int(samples_done)

    def append_and_die(path: Path, lines: list[dict[str, Any]]) -> None:
        nonlocal left
        append(path, lines)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    runner._append = append_and_die
    run(load(Path(model)), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
