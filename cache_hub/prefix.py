"""A filled cache in a folder: keys, values and all that was built over them, for a prompt that many questions share."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from .index.tensor_file import check_file, open_tensors, write_tensors

if TYPE_CHECKING:
    from .cache import KV_Cache

FORMAT, VERSION = "prefix", 1
_MANIFEST = "prefix.json"
_HEAD = "head.safetensors"
_READERS = 4


class SavedFile(BaseModel):
    """A file of a prefix: its size, and its digest as of `write_tensors`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a folder holds, and what it was made with; the content of its prefix.json.

    tokens: of the prompt. model: what identifies the model, and its name. tokenizer: its hash, "" if not told. built:
    the settings that what was built depends on; settings: all of them. notes: the caller's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: str = FORMAT
    version: int = VERSION
    strategy: str
    tokens: int
    dtype: str
    model_name: str
    model: dict[str, Any]
    tokenizer: str
    built: dict[str, Any]
    settings: dict[str, Any]
    notes: dict[str, Any]
    files: dict[str, SavedFile] = {}


def check_free(folder: str | Path) -> None:
    """Raises ValueError or OSError now, before long work, where `write_prefix` could not make `folder`."""
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"prefix folder: got {folder}, which is not empty, allowed: an empty folder or a new one")
    if path.exists() and not path.is_dir():
        raise ValueError(f"prefix folder: got {folder}, which is a file, allowed: an empty folder or a new one")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"prefix folder: got {folder}, allowed: a new folder in one that exists")
    with tempfile.TemporaryDirectory(dir=path.absolute().parent):
        pass


def write_prefix(folder: str | Path, cache: KV_Cache, head: dict[str, Tensor], manifest: Manifest) -> None:
    """Writes a cache as it is at the end of its prompt; the folder appears whole or not at all.

    head: tensors beside those of the cache. manifest: all but its files. Raises ValueError for a folder that is not
    empty, more than one sequence, or a cache that holds generated tokens; OSError.
    """
    check_free(folder)
    if cache.batch_size != 1:
        raise ValueError(f"batch_size: got {cache.batch_size}, allowed: 1, a prefix is one prompt")
    if any(cache.generated) or not all(cache.prompt_lengths):
        raise ValueError(
            f"cache: got {cache.prompt_lengths[0]} tokens of a prompt and {max(cache.generated)} generated ones, "
            "allowed: a prefilled cache without generated tokens"
        )
    target = Path(folder).absolute()
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        digests = {_HEAD: write_tensors(work / _HEAD, head, {})}
        for layer_idx in range(cache.layer_num):
            name, index = _layer_file(layer_idx), cache.layer_index(layer_idx)
            digests[name] = write_tensors(work / name, cache.layer_tensors(layer_idx), {"layer": layer_idx})
            if index is not None:
                digests[_index_file(layer_idx)] = index.save(work / _index_file(layer_idx))
        files = {name: SavedFile(bytes=(work / name).stat().st_size, sha256=digest) for name, digest in digests.items()}
        _write_manifest(work / _MANIFEST, manifest.model_copy(update={"files": files}))
        os.chmod(work, 0o755)
        os.rename(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder whose files have the sizes that it states.

    Raises FileNotFoundError where the folder or a file is missing; ValueError, naming the file, for another format or
    version, a corrupted manifest, a truncated file.
    """
    path = Path(folder) / _MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"prefix folder: got {folder}, which has no {_MANIFEST}, allowed: a saved prefix")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got no JSON ({error}), allowed: the manifest of a saved prefix") from None
    form, version = (content.get(key) for key in ("format", "version")) if isinstance(content, dict) else (None, None)
    if form != FORMAT or version != VERSION:
        raise ValueError(f"{path}: got {form!r} version {version!r}, allowed: {FORMAT!r} version {VERSION}")
    if content.pop("sha256", None) != _digest(content):
        raise ValueError(f"{path}: got content whose SHA-256 is not the stated one, allowed: an uncorrupted manifest")
    try:
        manifest = Manifest(**content)
    except ValidationError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, stated in manifest.files.items():
        file = path.parent / name
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, allowed: all {len(manifest.files)} files of the prefix")
        if file.stat().st_size != stated.bytes:
            raise ValueError(f"{file}: got {file.stat().st_size} bytes, allowed: {stated.bytes}")
    return manifest


def check_files(folder: str | Path, manifest: Manifest) -> None:
    """Reads all files once. ValueError, naming the file, where one is not what was written with the manifest."""
    paths = [Path(folder) / name for name in manifest.files]
    with ThreadPoolExecutor(_READERS) as pool:
        for path, digest, stated in zip(paths, pool.map(check_file, paths), manifest.files.values(), strict=True):
            if digest != stated.sha256:
                raise ValueError(f"{path}: got a file of another prefix, allowed: the one that was saved with it")


def read_head(folder: str | Path) -> dict[str, Tensor]:
    """The tensors that were written beside the cache's; after `check_files`."""
    return open_tensors(Path(folder) / _HEAD)[0]


def fill_cache(cache: KV_Cache, folder: str | Path, manifest: Manifest) -> None:
    """Makes an empty cache of one sequence what the saved one was at the end of its prompt; after `check_files`.

    The cache maps the files where it can read them so: they must stay as they are while it is used. Raises ValueError,
    naming the file, for tensors that do not fit the cache or lead to tokens that are not there.
    """
    cache.prompt_lengths = [manifest.tokens]
    for layer_idx in range(cache.layer_num):
        names = _layer_file(layer_idx), _index_file(layer_idx)
        if names[0] not in manifest.files:
            raise ValueError(f"{folder}: has no {names[0]}, allowed: {cache.layer_num} layers")
        path = Path(folder) / names[0]
        tensors, description = open_tensors(path)
        if description.get("layer") != layer_idx:
            raise ValueError(f"{path}: got layer {description.get('layer')}, allowed: {layer_idx}")
        index_path = Path(folder) / names[1] if names[1] in manifest.files else None
        try:
            cache.restore_layer(layer_idx, tensors, index_path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    cache.prepare_cache()


def _write_manifest(path: Path, manifest: Manifest) -> None:
    content = json.loads(manifest.model_dump_json())
    with open(path, "x", encoding="utf-8") as file:
        json.dump({**content, "sha256": _digest(content)}, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _layer_file(layer_idx: int) -> str:
    return f"layer_{layer_idx:03}.safetensors"


def _index_file(layer_idx: int) -> str:
    return f"layer_{layer_idx:03}.index.safetensors"
