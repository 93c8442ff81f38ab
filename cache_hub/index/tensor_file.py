"""Tensors and a JSON description in one file that is read back whole or not at all, mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.uint8: "U8",
}
# How every file begins, behind the 8 bytes that say how long the header is; then the digest.
_BEGIN = b'{"__metadata__":{"sha256":"'
_UNKNOWN = b"0" * 64
_LINE = 64  # bytes; rows that begin at a line of memory touch fewer lines
_BLOCK = 1 << 22
_MOST_HEADER = 1 << 24


def write_tensors(path: str | Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> str:
    """Writes a safetensors file; returns its digest, the SHA-256 of all its bytes with 64 zeros in the digest's place.

    tensors: float32, float16, bfloat16 or integers, on any device. Those that fill whole lines of 64 bytes come first
    in the file and begin with a line, then those of wider items. description: what JSON can hold. Raises OSError where
    there is a file or none can be written; what was begun is left to the caller.
    """
    rows = sorted(tensors.items(), key=lambda item: (item[1].nbytes % _LINE > 0, -item[1].itemsize))
    header: dict[str, Any] = {"__metadata__": {"sha256": _UNKNOWN.decode(), "description": json.dumps(description)}}
    at = 0
    for name, tensor in rows:
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    assert text.startswith(_BEGIN)
    text += b" " * (-(8 + len(text)) % _LINE)
    first = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(first)
    with open(path, "xb") as file:
        file.write(first)
        for _, tensor in rows:
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.seek(8 + len(_BEGIN))
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def check_file(path: str | Path) -> str:
    """The digest of a file that `write_tensors` wrote, once all its bytes have been read and agree with it.

    Raises ValueError, naming the file, for any that does not; FileNotFoundError.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        first = file.read(8 + len(_BEGIN) + len(_UNKNOWN))
        stated = first[-len(_UNKNOWN) :]
        if first[8 : 8 + len(_BEGIN)] != _BEGIN or int.from_bytes(first[:8], "little") > _MOST_HEADER:
            raise ValueError(f"{path}: got a file of another kind, or a corrupted one, allowed: a saved file")
        digest.update(first[: -len(_UNKNOWN)] + _UNKNOWN)
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest().encode() != stated:
        raise ValueError(f"{path}: got bytes whose SHA-256 is not the stated one, allowed: an uncorrupted, whole file")
    return digest.hexdigest()


def open_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file that `check_file` has passed.

    The tensors are mapped: their bytes are read where they are used, and what is written to them stays in memory. The
    file must not be changed while they are there. Raises ValueError for what is not safetensors, or has no description.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            description = json.loads((file.metadata() or {})["description"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}, allowed: a saved file") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path}: got the description {description!r}, allowed: an object")
    return tensors, description


def take(tensors: dict[str, Tensor], name: str, shape: Sequence[int | None], dtype: torch.dtype) -> Tensor:
    """Takes one tensor out of `tensors`. ValueError where it is missing, of another type or shape; None is any size."""
    allowed = f"{dtype} {['any' if size is None else size for size in shape]}"
    if name not in tensors:
        raise ValueError(f"{name}: missing, allowed: {allowed}")
    tensor = tensors.pop(name)
    fits = tensor.dim() == len(shape) and all(
        size in (None, given) for size, given in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        raise ValueError(f"{name}: got {tensor.dtype} {list(tensor.shape)}, allowed: {allowed}")
    return tensor


def check_ids(ids: Tensor, name: str, stop: int, start: int = -1) -> None:
    """ValueError where an integer of `ids` is outside start..stop - 1."""
    if ids.numel() == 0:
        return
    least, most = int(ids.min()), int(ids.max())
    if least < start or most >= stop:
        raise ValueError(f"{name}: got ids {least} to {most}, allowed: {start} to {stop - 1}")
