"""Pinned memory: exactly the bytes wanted, given back in time, by its own process alone, or a clear error."""

import gc
import os
from dataclasses import dataclass, field

import pytest
import torch

from cache_hub import pinned
from cache_hub.pinned import huge_empty, pinned_empty, rows_on

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass
class FakeRuntime:
    """cudart that notes what is registered; `code` is what it answers."""

    code: int = 0
    calls: list[tuple[str, int]] = field(default_factory=list)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("register", nbytes))
        assert address % 4096 == 0
        assert flags == 3
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return self.code

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 3, 1537, 2, 64)])
def test_exactly_the_bytes_wanted_are_registered(
    shape: tuple[int, ...], dtype: torch.dtype, runtime: FakeRuntime
) -> None:
    states = pinned_empty(shape, dtype)
    assert (states.shape, states.dtype) == (shape, dtype)
    assert states.is_contiguous()
    assert runtime.calls == [("register", states.nbytes)]
    assert states.storage_offset() == 0, "torch asks about the beginning of the storage"
    drawn = torch.randint(-100, 100, shape).to(dtype)
    assert torch.equal(states.copy_(drawn), drawn)


def test_given_back_when_the_last_view_is_gone(runtime: FakeRuntime) -> None:
    with torch.inference_mode():
        states = pinned_empty((4, 6, 2, 8), torch.float32)
        view = states[1:, ..., 0, :]
    address = states.data_ptr()
    del states
    gc.collect()
    assert len(runtime.calls) == 1
    with torch.inference_mode():
        view[:] = 1
    assert float(view.sum()) == view.numel()
    del view
    gc.collect()
    assert runtime.calls[1:] == [("unregister", address)]


def test_a_forked_child_does_not_call_cuda(runtime: FakeRuntime) -> None:
    states = pinned_empty((5000,), torch.float32).fill_(2)
    child = os.fork()
    if child == 0:
        whole = float(states.sum()) == 10_000
        del states
        gc.collect()
        os._exit(0 if whole and len(runtime.calls) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del states
    gc.collect()
    assert [name for name, _ in runtime.calls] == ["register", "unregister"]


def test_what_cannot_be_had_is_named_with_its_bytes(runtime: FakeRuntime) -> None:
    runtime.code = 2
    with pytest.raises(RuntimeError, match=r"^pinned memory: 4,000,000 bytes cannot be registered: error 2$"):
        pinned_empty((1000, 1000), torch.float32)
    assert len(runtime.calls) == 1, "what was not registered is not unregistered"
    with pytest.raises(RuntimeError, match=r"^pinned memory: [\d,]+ bytes cannot be mapped: "):
        pinned_empty((1 << 60,), torch.float32)


def test_all_pages_are_touched() -> None:
    region = pinned.map_region(3 * 4096 + 5)
    states = torch.frombuffer(region, dtype=torch.uint8).fill_(9)
    pinned.touch(states)
    assert (states == 0).nonzero().flatten().tolist() == [0, 4096, 8192, 12288]


def test_without_cuda_it_is_plain_memory() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert pinned_empty((3, 0, 2), torch.float16).shape == (3, 0, 2)
    assert pinned_empty([3, 2], torch.float16).dtype == torch.float16


def test_rows_stay_where_they_are_on_a_cpu() -> None:
    rows = torch.randn(3, 5, 2, 8)[:, :, 0]
    assert rows_on(rows, torch.device("cpu")) is rows


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("device", range(max(torch.cuda.device_count(), 1)))
def test_a_gpu_copies_from_and_to_it(device: int) -> None:
    where = torch.device("cuda", device)
    states = pinned_empty((3, 4099, 2, 64), torch.bfloat16)
    assert states.is_pinned()
    assert states[1:, 5:, 1].is_pinned()
    drawn = torch.randn(3, 4099, 2, 64, device=where).bfloat16()
    states.copy_(drawn, non_blocking=True)
    torch.cuda.synchronize(where)
    assert torch.equal(states, drawn.cpu())
    assert torch.equal(states.to(where, non_blocking=True), drawn)
    assert torch.equal(rows_on(states[:, 7:, 0], where), drawn[:, 7:, 0])


@pytest.mark.gpu
@needs_gpu
def test_pinned_memory_comes_and_goes() -> None:
    """An address that was given back can be registered again, and no torch allocator holds any of it."""
    held = torch.cuda.host_memory_stats()["active_bytes.current"]
    for _ in range(20):
        states = pinned_empty(((1 << 26) + 4096,), torch.uint8)
        there = states.to("cuda", non_blocking=True)
        del states
    assert there.shape == ((1 << 26) + 4096,)
    assert torch.cuda.host_memory_stats()["active_bytes.current"] == held


@pytest.mark.parametrize("rows", [0, 7, 1 << 21])
def test_memory_in_huge_pages_is_memory(rows: int) -> None:
    states = huge_empty((2, rows, 3), torch.uint16)
    assert states.shape == (2, rows, 3)
    view = states[1:]
    states.fill_(7)
    del states
    assert bool((view == 7).all())
