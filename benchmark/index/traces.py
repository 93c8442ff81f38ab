"""The trace format: one .npz for every (layer, kv head) of a prompt, and trace.json, which says where they come from.

layer{LL}_head{HH}.npz holds q [g, n, d], k [n, d], v [n, d] of the prompt and q_decode [g, t, d] of the tokens
generated after it, float16, queries and keys rotated. It may hold q_predicted [g, m + t, d] beside them: what
DecoderLayer.predict_query says, of what enters the layer before, that the queries of the last m = min(PREDICTED, n)
prompt positions and of the t generated tokens will be; layer 0 has none. A query of q_decode is asked about the prompt
alone: in the model it also saw itself and the tokens generated before it, whose keys and values no file holds. Where a
file has no q_decode, or t = 0, the last HELD_OUT prompt positions are held out: the prompt then ends before them, and
their queries are the ones that are asked.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

HELD_OUT = 16
PREDICTED = 64
INFO_FILE = "trace.json"
_FILE = re.compile(r"layer(\d+)_head(\d+)\.npz")
_SHAPES = {"q": "[g, n, d]", "k": "[n, d]", "v": "[n, d]", "q_decode": "[g, t, d]"}
_OPTIONAL = {"q_predicted": f"[g, min({PREDICTED}, n) + t, d]"}


@dataclass(frozen=True)
class LayerTrace:
    """One layer of a trace, kv heads in order; CPU tensors of the files' type.

    queries [Hkv, g, n, d], keys and values [Hkv, n, d] of the prompt; tests [Hkv, g, t, d] are the queries to ask.
    held_out: whether the tests are the prompt's own last positions. predicted [Hkv, g, p + t, d] are the predicted
    queries of the last p prompt positions and of the tests, None where none were recorded.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    tests: Tensor
    held_out: bool
    predicted: Tensor | None = None


@dataclass(frozen=True)
class TraceFolder:
    """A folder of trace files. info: its trace.json, empty without one; files: paths by layer and kv head; tokens: of
    the prompt, without what is held out; predicted: how many of its last positions have predicted queries, as the tests
    then have, by layer, without the layers that have none."""

    path: Path
    info: dict[str, Any]
    files: dict[int, dict[int, Path]]
    tokens: int = 0
    predicted: dict[int, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def digest(self) -> str:
        """Of how it was made, the files' names and their arrays' checksums: another trace under the same name has
        another one."""
        made = [self.info.get("protocol"), self.info.get("decoded")]
        arrays = [(p.name, _checksums(p)) for heads in self.files.values() for p in heads.values()]
        return hashlib.sha256(json.dumps([made, arrays], sort_keys=True).encode()).hexdigest()[:12]

    def load(self, layer: int) -> LayerTrace:
        """Reads a layer. Raises ValueError as read_file, and where kv heads differ in arrays or shape or there is no
        prompt."""
        heads = [read_file(path) for path in self.files[layer].values()]
        for path, arrays in zip(self.files[layer].values(), heads, strict=True):
            if arrays.keys() != heads[0].keys():
                raise ValueError(
                    f"{path}: has {', '.join(arrays)}, allowed: {', '.join(heads[0])} as the layer's first kv head"
                )
            for name, first in heads[0].items():
                if arrays[name].shape != first.shape:
                    raise ValueError(
                        f"{path}: {name} is {list(arrays[name].shape)}, allowed: {list(first.shape)} as in the "
                        "layer's other kv heads"
                    )
        states = {name: torch.from_numpy(np.stack([arrays[name] for arrays in heads])) for name in heads[0]}
        q, k, v, tests = (states[name] for name in _SHAPES)
        held_out = tests.shape[2] == 0
        if held_out:
            kept = k.shape[1] - HELD_OUT
            if kept < 1:
                raise ValueError(
                    f"{self.path}, layer {layer}: {k.shape[1]} tokens and no q_decode, allowed: more than the "
                    f"{HELD_OUT} positions that are held out"
                )
            q, k, v, tests = q[:, :, :kept], k[:, :kept], v[:, :kept], q[:, :, kept:]
        return LayerTrace(layer, q, k, v, tests, held_out, states.get("q_predicted"))


def file_name(layer: int, head: int) -> str:
    return f"layer{layer:02d}_head{head:02d}.npz"


def open_folder(path: Path, layers: Collection[int] | None = None) -> TraceFolder:
    """The trace in a folder, of all layers or of some; every file of them is read once and checked.

    Raises FileNotFoundError for a folder without trace files or without those that its trace.json lists, ValueError for
    layers it does not have, for a damaged trace.json, and as TraceFolder.load.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"traces: folder {path} does not exist")
    info = read_info(path)
    found: dict[int, dict[int, Path]] = {}
    for file in sorted(path.iterdir()):
        if match := _FILE.fullmatch(file.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = file
    if not found:
        raise FileNotFoundError(
            f"traces: {path} has no files layer..._head....npz; allowed: a folder of extracted traces"
        )
    stated = [(layer, head) for layer in info.get("layers", ()) for head in range(info.get("kv_heads", 0))]
    missing = [file_name(*where) for where in stated if where[1] not in found.get(where[0], {})]
    if missing:
        raise FileNotFoundError(
            f"traces: {path} lacks {len(missing)} files of its {INFO_FILE} ({', '.join(missing[:3])}); its extraction "
            "has not ended, call it again"
        )
    unknown = sorted(set(layers or ()) - set(found))
    if unknown:
        raise ValueError(f"layers: got {unknown}, allowed for {path}: {', '.join(map(str, sorted(found)))}")
    chosen = sorted(found if layers is None else layers)
    folder = TraceFolder(path, info, {layer: dict(sorted(found[layer].items())) for layer in chosen})
    shapes, predicted = {}, {}
    for layer in tqdm(chosen, desc=f"{folder.name}: check", unit="layer", disable=None, leave=False):
        trace = folder.load(layer)
        shapes[layer] = (*trace.queries.shape[:3], trace.tests.shape[2])
        if trace.predicted is not None:
            predicted[layer] = trace.predicted.shape[2] - trace.tests.shape[2]
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"layer {layer} {list(shape)}" for layer, shape in shapes.items())
        raise ValueError(f"traces: {path} mixes prompts, [kv heads, g, n, t] are {told}; allowed: the same for all")
    return replace(folder, tokens=shapes[chosen[0]][2], predicted=predicted)


def _checksums(path: Path) -> list[tuple[str, int]]:
    """Name and CRC of every array of a file, from the archive's table."""
    with zipfile.ZipFile(path) as archive:
        return [(member.filename, member.CRC) for member in archive.infolist()]


def read_info(path: Path) -> dict[str, Any]:
    """trace.json of a folder, {} where there is none. Raises ValueError where it is no JSON object."""
    file = path / INFO_FILE
    if not file.exists():
        return {}
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(info, dict):
        raise ValueError(f"{file}: got {type(info).__name__}, allowed: an object")
    return info


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The arrays q, k, v, q_decode of a file, and q_predicted if it has it; a missing q_decode becomes [g, 0, d].

    Raises ValueError naming the file for a file that is no .npz, a missing array, a type that is not float16 or
    float32, shapes that do not fit, NaN and infinity.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in _SHAPES | _OPTIONAL if name in content.files}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable .npz file of plain arrays: {error}") from None
    for name in ("q", "k", "v"):
        if name not in arrays:
            raise ValueError(f"{path}: array {name} is missing, has {', '.join(arrays) or 'none'}; needs q, k, v")
    for name, array in arrays.items():
        if array.dtype not in (np.float16, np.float32):
            raise ValueError(f"{path}: {name} is {array.dtype}, allowed: float16, float32")
    q, k = arrays["q"], arrays["k"]
    arrays.setdefault("q_decode", np.zeros((q.shape[0], 0, q.shape[-1]), q.dtype) if q.ndim == 3 else q)
    group, (n, d) = q.shape[0] if q.ndim == 3 else -1, k.shape if k.ndim == 2 else (-1, -1)
    t = arrays["q_decode"].shape[1] if arrays["q_decode"].ndim == 3 else -1
    allowed = {"q": (group, n, d), "k": (n, d), "v": (n, d), "q_decode": (group, t, d)}
    allowed["q_predicted"] = (group, min(PREDICTED, n) + t, d)
    if min(group, n, d) < 1 or any(array.shape != allowed[name] for name, array in arrays.items()):
        told = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        wanted = ", ".join(f"{name} {shape}" for name, shape in (_SHAPES | _OPTIONAL).items())
        raise ValueError(f"{path}: shapes do not fit: {told}; allowed: {wanted}, none of g, n, d zero")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            at = np.argwhere(~np.isfinite(array))[0].tolist()
            raise ValueError(f"{path}: {name} holds {array[tuple(at)]} at {at}, allowed: finite values")
    return arrays
