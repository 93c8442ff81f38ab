"""CPU memory that a GPU reads and writes where it lies, of exactly the bytes wanted.

torch's allocator of pinned memory makes the next power of two of them (docs of torch.cuda.host_memory_stats), which
for a store of 2^k tokens and a few more is twice as much.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from attn_hub import copy_rows

# cudaHostRegisterPortable | cudaHostRegisterMapped: for every GPU, at the address that it has for the CPU.
_FLAGS = 3
_WORTH_HUGE_PAGES = 1 << 23


def pinned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in pinned CPU memory of its own, with whatever in it; in plain memory where there is no CUDA.

    `is_pinned()` holds for it and its views, and all GPUs may copy and read from it until the last of them is gone;
    then it waits for the GPUs and gives the memory back. A forked child may only let go of it. Raises RuntimeError,
    with the number of bytes, where the memory cannot be had or registered.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if not torch.cuda.is_available():
        return torch.empty(tuple(shape), dtype=dtype)
    if nbytes == 0:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    region = map_region(nbytes)
    states = torch.frombuffer(region, dtype=torch.uint8)
    touch(states)
    register(states)
    # The finalizer holds the region: it cannot be unmapped before. Where the process ends, CUDA gives back what it has.
    storage = states.untyped_storage()
    weakref.finalize(storage, _release, region, states.data_ptr(), os.getpid()).atexit = False
    return states.view(dtype).view(tuple(shape))


def huge_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in CPU memory, with whatever in it: in huge pages, where the system has them and it fills some, since
    what is read here and there misses the address cache on nearly every read otherwise."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _WORTH_HUGE_PAGES:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(map_region(nbytes), dtype=dtype).view(tuple(shape))


def map_region(nbytes: int) -> mmap.mmap:
    """Anonymous memory that begins with a page, in huge pages where the system has them. RuntimeError as above."""
    try:
        region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RuntimeError(f"pinned memory: {nbytes:,} bytes cannot be mapped: {error}") from error
    with contextlib.suppress(OSError):  # a kernel that was built without them refuses the advice
        region.madvise(mmap.MADV_HUGEPAGE)
    return region


def touch(states: Tensor) -> None:
    """Has the pages of bytes [n] made by all of torch's threads: registering makes what is missing with one."""
    states[:: mmap.PAGESIZE] = 0


def register(states: Tensor) -> None:
    """Pins bytes [n] that begin with a page. RuntimeError as above."""
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostRegister(states.data_ptr(), states.nbytes, _FLAGS)
    if int(code):
        told = cudart.cudaGetErrorString(code)
        raise RuntimeError(f"pinned memory: {states.nbytes:,} bytes cannot be registered: {told}")


def _release(region: mmap.mmap, address: int, pid: int) -> None:
    if os.getpid() != pid:
        return
    for device in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(device):  # others have no work, and would get a context
            torch.cuda.synchronize(device)
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostUnregister(address)
    if int(code):
        raise RuntimeError(f"pinned memory: {len(region):,} bytes stay: {cudart.cudaGetErrorString(code)}")


def rows_on(rows: Tensor, device: torch.device) -> Tensor:
    """Rows [R, N, D] of a store on `device`, contiguous there; on the CPU they stay as they are.

    A GPU reads pinned rows itself: torch would make those that do not lie side by side contiguous on the CPU first, in
    pageable memory.
    """
    if device.type != "cuda" or not rows.is_pinned():
        return rows.to(device)
    there = torch.empty(rows.shape, dtype=rows.dtype, device=device)
    ids = torch.arange(rows.shape[1], dtype=torch.int32, device=device).expand(1, rows.shape[0], -1)
    copy_rows(rows[None], there[None], ids, ids)
    return there


@contextlib.contextmanager
def copying(device: torch.device, *sources: Tensor) -> Iterator[torch.cuda.Event]:
    """For copies to pinned memory beside what the GPU `device` computes: what the block tells it, it does on a stream
    of its own, behind all that the current stream has been told before.

    Gives an event that happens when that is done, for `synchronize` of any thread; it holds from the end of the block
    on. sources: the tensors that the block reads; they may be let go of at once, but not written to before the event.
    """
    stream, done = _copy_stream(device), torch.cuda.Event(blocking=True)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield done
            done.record(stream)
    finally:
        for source in sources:
            source.record_stream(stream)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
