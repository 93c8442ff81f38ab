"""Token indexes in files: all that a build made, and none of the keys that it refers to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import TokenIndex, check_build
from .tensor_file import check_file, open_tensors, write_tensors

_FORMAT, _VERSION = "token index", 1
_SAMPLED_KEYS = 256


def save_index(index: TokenIndex, path: str | Path) -> str:
    """Writes a built index; returns the file's digest. See TokenIndex.save."""
    tensors, keys, extra = index.state()
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "strategy": index.strategy,
        "options": index.all_options(),
        "keys": describe_keys(keys, extra),
    }
    return write_tensors(path, tensors, description)


def load_index(
    kind: type[TokenIndex],
    path: str | Path,
    keys: Tensor,
    extra: Tensor | None,
    num_threads: int | None,
    given: dict[str, Any],
    checked: bool = False,
) -> TokenIndex:
    """The index of a file over the keys that it was built for. See TokenIndex.load.

    given: options that take the place of the file's, only those of the search may differ. checked: the bytes were
    compared with their digest before.
    """
    if not checked:
        check_file(path)
    check_build(keys, keys[:, None, :0], None, extra)
    tensors, description = open_tensors(path)
    form, version = description.get("format"), description.get("version")
    if form != _FORMAT or version != _VERSION:
        raise ValueError(f"{path}: got {form} version {version}, allowed: {_FORMAT} version {_VERSION}")
    if description.get("strategy") != kind.strategy:
        raise ValueError(f"{path}: got an index of {description.get('strategy')}, allowed: {kind.strategy}")
    make: Any = kind
    options = _joined(path, kind, make().all_options(), description.get("options"), given)
    index: TokenIndex = make(num_threads=num_threads, **options)
    there, built_for = describe_keys(keys, extra), description.get("keys")
    if there != built_for:
        raise ValueError(f"keys: got {there}, allowed: those that {path} was built for, {built_for}")
    try:
        index.restore(tensors, keys, extra)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return index


def _joined(
    path: str | Path, kind: type[TokenIndex], known: dict[str, Any], saved: Any, given: dict[str, Any]
) -> dict[str, Any]:
    """A file's options, those given in their place. ValueError for unknown ones, and for another build."""
    of_build = known.keys() - kind.search_options
    if not isinstance(saved, dict) or not of_build <= saved.keys() <= known.keys():
        raise ValueError(f"{path}: got the options {saved}, allowed: {', '.join(known) or 'none'}")
    if not given.keys() <= known.keys():
        raise ValueError(f"options: got {', '.join(given)}, allowed: {', '.join(known) or 'none'}")
    for name in sorted(of_build & given.keys()):
        if given[name] != saved[name]:
            raise ValueError(f"{name}: got {given[name]!r}, allowed: {saved[name]!r}, with which {path} was built")
    return {**saved, **given}


def describe_keys(keys: Tensor, extra: Tensor | None) -> dict[str, Any]:
    """What tells keys [R, N, D] (and extra) from others, without reading them all: type, shape, and the SHA-256 of
    at most 256 keys of every row, evenly spread."""
    at = torch.linspace(0, keys.shape[1] - 1, min(keys.shape[1], _SAMPLED_KEYS), dtype=torch.float64).long()
    digest = hashlib.sha256()
    for states in (keys, extra):
        if states is not None:
            digest.update(states[:, at.to(states.device)].cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    named = {"dtype": str(keys.dtype).removeprefix("torch."), "shape": list(keys.shape), "lifted": extra is not None}
    return {**named, "sha256": digest.hexdigest()}
