"""Damage to saved files, and files with bad content but right digests."""

import hashlib
import json
import random
from pathlib import Path

import torch
from torch import Tensor

from cache_hub.index.tensor_file import open_tensors, write_tensors

DIGEST = slice(35, 99)  # where a saved file states its own


def damage(path: Path, seed: int) -> None:
    """Flips one to four bits, cuts the end off, or adds bytes, by the seed."""
    rng, data = random.Random(f"{path.name}/{seed}"), bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "flip", "cut", "add"])
    if kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "add":
        data += rng.randbytes(rng.randint(1, 80))
    else:
        # Half of the flips in the header, which is the smaller part.
        stop = rng.choice([len(data), min(len(data), 600)])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(stop)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def seal(path: Path) -> str:
    """States the right digest of a tensor file, as if its content had been written so."""
    data = bytearray(path.read_bytes())
    data[DIGEST] = b"0" * 64
    digest = hashlib.sha256(data).hexdigest()
    data[DIGEST] = digest.encode()
    path.write_bytes(data)
    return digest


def replace_tensor(path: Path, name: str, tensor: Tensor | None) -> str:
    """Rewrites a tensor file with another tensor under a name, or without it; returns its digest."""
    tensors, description = open_tensors(path)
    tensors = {key: value.clone() for key, value in tensors.items() if key != name}
    if tensor is not None:
        tensors[name] = tensor
    path.unlink()
    return write_tensors(path, tensors, description)


def seal_manifest(folder: Path, **changes: object) -> None:
    """Rewrites a prefix's manifest with other values, and the sizes and digests that its files have now."""
    path = folder / "prefix.json"
    content = json.loads(path.read_text())
    content.pop("sha256")
    content |= changes
    for name, stated in content["files"].items():
        file = folder / name
        stated |= {"bytes": file.stat().st_size, "sha256": file.read_bytes()[DIGEST].decode()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "sha256": digest}))


def mapped_files(tensor: Tensor) -> list[str]:
    """The files from which the process has mapped the memory of a tensor."""
    address, found = tensor.data_ptr(), []
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end and "/" in line:
            found.append(Path(line[line.index("/") :]).name)
    return found


def same(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit."""
    return left.dtype == right.dtype and torch.equal(left, right)
