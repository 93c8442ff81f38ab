"""What a run measured, where it ran, and files that are written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "transformers", "faiss-cpu", "numpy", "peft", "gguf")


def environment() -> dict[str, Any]:
    """Hardware, package versions and the git commit ("+changes" where the tree differs from it)."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": versions,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
    }


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_json(path: str | Path, record: Any) -> None:
    """Writes a JSON file as write_text does."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a file whole or not at all. Raises OSError (a full disk, say) and leaves what was there before."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps the other processes out of a folder's `.lock`, as they do this one, for what is read, changed and written.
    Waits; not to be nested."""
    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_writable(path: str | Path) -> None:
    """Raises OSError or ValueError now, before long work, where `path` could not be written at its end."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"output: got the folder {path}, allowed: a file")
    if not path.parent.is_dir():
        raise ValueError(f"output: folder {path.parent} does not exist")
    with tempfile.NamedTemporaryFile(dir=path.parent):
        pass


def _commit() -> str | None:
    def git(*words: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].split(":")[1].strip() if names else platform.processor()
