"""What runs will need of CPU and GPU memory, estimated before they start, against what is there; and the CPUs."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from config import RetroInferConfig

    from .cache import KV_Cache

CPU = torch.device("cpu")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class RunShape:
    """Prompts of `lengths` tokens, each with room for max_new_length more, `prefill_bsz` of them read together by a
    model of this shape, whose layers compute on `devices`, one entry each.

    mlp_size: of the MLP's inner states, which are made of `chunk` tokens at a time; 0: they do not count.
    """

    lengths: tuple[int, ...]
    max_new_length: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]
    prefill_bsz: int = 1
    mlp_size: int = 0
    chunk: int = 1

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def row_bytes(self) -> int:
        """Of one token's key, or value, of all kv heads of a layer."""
        return self.kv_heads * self.head_dim * self.dtype.itemsize

    def cut(self, longest: int) -> RunShape:
        """The same, of prompts no longer than that."""
        return replace(self, lengths=tuple(min(length, longest) for length in self.lengths))

    def store_bytes(self, more: int, device: torch.device, pinned: bool = False) -> int:
        """Of a layer's keys and values of all prompts, of `more` tokens beside each, allocated for the longest.

        Pageable memory counts where it is written, pinned memory and that of a GPU as a whole.
        """
        if device.type == "cpu" and not pinned:
            return 2 * sum(max(length + more, 0) for length in self.lengths) * self.row_bytes
        return 2 * self.batch * max(self.longest + more, 0) * self.row_bytes


@dataclass(frozen=True)
class Need:
    """Bytes that one layer needs in one place, and for what.

    when: "kept" from the prompt on; "build": temporaries of one layer after the other; "after": kept from the end of
    the prompt on, when the temporaries are gone.
    """

    device: torch.device
    what: str
    nbytes: int
    when: Literal["kept", "build", "after"] = "kept"


# The class of a cache and its settings.
Build = tuple["type[KV_Cache]", "RetroInferConfig"]


def required_bytes(builds: Sequence[Build], shape: RunShape) -> dict[torch.device, dict[str, int]]:
    """For each device, what caches that are filled by one prefill need at their peak, by what it is for.

    An estimate that is rather too low, so that nothing is refused that would work: counted are the tensors that are
    known to be there together. Not counted are what the native code, faiss and Triton hold while they build, the
    temporaries of the clusters, of the MLP and of decoding, what insertion adds to an index, fragmentation, swap.
    """
    tables: dict[str, dict[torch.device, Counter[str]]] = {
        when: defaultdict(Counter) for when in ("kept", "build", "mlp", "after")
    }
    while_built, in_mlp = prompt_state_bytes(shape)
    for device, layers in Counter(shape.devices).items():
        tables["build"][device]["the prompt's states in a layer"] = while_built
        tables["mlp"][device]["the prompt's states in a layer"] = in_mlp
        for cache, settings in builds:
            for need in cache.layer_needs(settings, shape, device):
                table = tables[need.when][need.device]
                if need.when == "build":
                    table[need.what] = max(table[need.what], need.nbytes)
                else:
                    table[need.what] += need.nbytes * layers
    peaks = {}
    for device in {device for table in tables.values() for device in table}:
        largest = max((tables[when][device] for when in ("build", "mlp", "after")), key=Counter.total)
        peaks[device] = dict((tables["kept"][device] + largest).most_common())
    return peaks


def prompt_state_bytes(shape: RunShape) -> tuple[int, int]:
    """What the states of the T tokens read together take where a layer computes: while its index is built, and in its
    MLP, whichever is more.

    First the hidden states, queries, keys, values and the attention's output, T (d + 2 (H + Hkv) D); then hidden states
    and output with those of `chunk` tokens in the MLP, T (d + H D) + chunk (d + 2 I), the queries, keys and values
    being gone. 524,288 tokens of Llama 3.1 8B in bfloat16 are 14 GiB, then 8 + 1. The build of the graph adds its
    lists, 2 GiB of 32 keys for each query and .5 to 1 of keys and links, the keys, 1 GiB, and what it selects from; the
    weights are 15 GiB.
    """
    tokens, queries = shape.prefill_bsz * shape.longest, shape.heads * shape.head_dim
    while_built = tokens * (shape.hidden_size + 2 * (queries + shape.kv_heads * shape.head_dim))
    inner = shape.hidden_size + 2 * shape.mlp_size if shape.mlp_size else 0
    in_mlp = tokens * (shape.hidden_size + queries) + min(tokens, shape.chunk) * inner
    return while_built * shape.dtype.itemsize, in_mlp * shape.dtype.itemsize


def fits(builds: Sequence[Build], shape: RunShape) -> bool:
    """Whether what `required_bytes` counts is available."""
    peaks = required_bytes(builds, shape)
    return not _short(peaks, {device: available_bytes(device) for device in peaks})


def check_memory(names: str, builds: Sequence[Build], shape: RunShape) -> None:
    """Raises ValueError where less memory is available than `required_bytes`, with what is needed, what there is, and
    the longest prompt that fits. `names`: what the message calls the strategies."""
    peaks = required_bytes(builds, shape)
    there = {device: available_bytes(device) for device in peaks}
    lacking = _short(peaks, there)
    if not lacking:
        return
    fits, too_long = 0, shape.longest
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if _short(required_bytes(builds, shape.cut(middle)), there):
            too_long = middle
        else:
            fits = middle
    reasons = [
        f"needs {size(sum(peaks[device].values()))} of {_name(device)} memory "
        f"({', '.join(f'{what} {size(nbytes)}' for what, nbytes in peaks[device].items() if nbytes)}), "
        f"{size(there[device])} are available"
        for device in sorted(lacking, key=str)
    ]
    largest = f"the largest context that fits is a prompt of {fits:,} tokens" if fits else "no prompt fits"
    raise ValueError(
        f"{names} with a prompt of {shape.longest:,} tokens and {shape.max_new_length:,} new ones, x {shape.batch}: "
        f"{'; '.join(reasons)}; {largest}"
    )


def _short(needed: dict[torch.device, dict[str, int]], there: dict[torch.device, float]) -> list[torch.device]:
    return [device for device, table in needed.items() if sum(table.values()) > there[device]]


def available_bytes(device: torch.device) -> float:
    """Bytes that this process can still get there; infinite where the system does not tell.

    CPU: MemAvailable, or what the limit of a control group leaves, where that is less; caches of files count as free,
    and so does pinned memory that torch holds without use. GPU: what is free, and what torch holds without use.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    limits = [_mem_available(Path("/proc/meminfo")), *_left_by_cgroups(Path("/proc/self/cgroup"), _CGROUPS)]
    return min(limits) + _unused_pinned()


def usable_cpus() -> int:
    """CPUs that this process may use, fewer than the machine has where the system confines it to some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def size(nbytes: float) -> str:
    """For messages: 1,234,000,000 is 1.2 GB."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def _name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else f"GPU ({device})"


def _mem_available(meminfo: Path) -> float:
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return float("inf")


def _left_by_cgroups(membership: Path, root: Path) -> list[float]:
    """What the memory limits of the process's control groups leave, of version 1 or 2, those above them included."""
    if not membership.is_file():
        return []
    left = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names, cached = root, ("memory.max", "memory.current"), ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cached = ("total_inactive_file", "total_active_file")
        else:
            continue
        own = base / path.strip("/")
        # Inside a container the path may be one of the host; the limit is then at the base.
        for folder in [own, *own.parents[: len(own.parts) - len(base.parts)]]:
            limit, used, stat = (folder / name for name in (*names, "memory.stat"))
            if not (limit.is_file() and used.is_file()) or limit.read_text().strip() == "max":
                continue
            stats = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
            files = sum(int(stats.get(name, 0)) for name in cached)
            left.append(float(int(limit.read_text()) - int(used.read_text()) + files))
    return left


def _unused_pinned() -> int:
    if not torch.cuda.is_initialized() or not hasattr(torch.cuda, "host_memory_stats"):
        return 0
    stats = torch.cuda.host_memory_stats()
    return int(stats.get("allocated_bytes.current", 0) - stats.get("active_bytes.current", 0))
