"""Which strategy "auto" is."""

import pytest
import torch

from cache_hub import SCANNED_UP_TO, RunShape, make_cache, memory, settle
from cache_hub.memory import CPU
from config import GraphConfig, RetroInferConfig

CUDA = torch.device("cuda:0")
GIB = 1 << 30
SIZES = {"heads": 32, "kv_heads": 8, "head_dim": 128, "hidden_size": 4096, "dtype": torch.bfloat16}


def shape(device: torch.device = CUDA, length: int = 131072, batch: int = 1) -> RunShape:
    return RunShape((length,) * batch, 16, **SIZES, devices=(device,) * 32)


@pytest.fixture
def memory_of(monkeypatch: pytest.MonkeyPatch):
    """Sets the memory that there is, in GiB."""

    def there(gpu: float, cpu: float = 1000) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda device: (gpu if device.type == "cuda" else cpu) * GIB)

    return there


def test_auto_scans_where_the_compact_keys_fit_the_gpu(memory_of) -> None:
    settings = RetroInferConfig(core=3)
    memory_of(40)
    ((strategy, settled),) = settle([("auto", settings)], shape())
    assert strategy == "flat"
    assert settled == settings.model_copy(update={"flat": settled.flat})
    assert settled.flat.on_gpu
    # 4.4 GB of compact keys a prompt
    assert settle([("auto", settings)], shape(batch=16)) == [("attention_aware_graph", settings)]
    memory_of(8)
    assert settle([("auto", settings)], shape()) == [("attention_aware_graph", settings)]
    memory_of(40, cpu=1)  # nothing fits: the graph is what is refused
    assert settle([("auto", settings)], shape()) == [("attention_aware_graph", settings)]


def test_auto_is_the_graph_for_prompts_that_take_longer_to_scan(memory_of) -> None:
    memory_of(500)
    for length, expected in ((SCANNED_UP_TO, "flat"), (SCANNED_UP_TO + 1, "attention_aware_graph")):
        assert settle([("auto", RetroInferConfig())], shape(length=length))[0][0] == expected


def test_auto_is_the_graph_on_a_cpu_and_where_the_scan_cannot_serve(memory_of) -> None:
    memory_of(40)
    assert settle([("auto", RetroInferConfig())], shape(CPU))[0][0] == "attention_aware_graph"
    for graph in (GraphConfig(estimation="softmax_lift"), GraphConfig(top_k=2000)):
        settings = RetroInferConfig(attention_aware_graph=graph)
        assert settle([("auto", settings)], shape()) == [("attention_aware_graph", settings)]


def test_others_stay_and_count_towards_what_must_fit(memory_of) -> None:
    settings = RetroInferConfig()
    memory_of(21)
    builds = [("full", settings), ("auto", settings)]
    assert [strategy for strategy, _ in settle(builds[1:], shape())] == ["flat"]
    assert settle(builds, shape()) == [("full", settings), ("attention_aware_graph", settings)]
    assert settle(builds[:1], shape()) == builds[:1]


def test_no_cache_is_made_of_auto_itself() -> None:
    with pytest.raises(ValueError, match="retrieval_strategy: got 'auto', allowed: full, flat, "):
        make_cache("auto", RetroInferConfig())
