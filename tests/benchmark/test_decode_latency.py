"""The latency of a decode token: how traces are extended, what a row says, resume, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_cases import random_head, write_trace

from benchmark.decode import latency, latency_plot
from benchmark.decode.dense import DenseModel, DenseSizes, StepStates
from benchmark.decode.extended import ExtendedTraces, Shape
from benchmark.decode.steps import Prompts, fill
from benchmark.index.traces import TraceFolder, open_folder
from cache_hub import make_cache
from config import RetroInferConfig


def folders(tmp_path: Path, tests: int = 4) -> list[TraceFolder]:
    """200 and 150 tokens, layers 0, 2 and 0, 2, 3, 3 kv heads of group 3, d = 16."""
    made = (("a", 200, (0, 2)), ("b", 150, (0, 2, 3)))
    sizes: dict[str, Any] = {"kv_heads": 3, "group": 3, "dim": 16, "tests": tests}
    return [open_folder(write_trace(tmp_path / name, n=n, layers=layers, **sizes)) for name, n, layers in made]


def test_heads_are_joined_shifted_and_taken_from_the_next_layers(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    extended = ExtendedTraces([a, b], Shape(4, 16, 4, 32), steps=3)
    assert extended.layers == [0, 2], "those in common"
    assert extended.tokens == 200 + 146
    assert extended.wide_heads(0, 0) == [(0, 0), (0, 1), (0, 2), (2, 0)]
    assert extended.wide_heads(1, 0) == extended.wide_heads(0, 1) == [(2, 0), (2, 1), (2, 2), (0, 0)]
    states = extended.states(0, 0, 346, torch.float32)
    assert states.queries.shape == (346, 16, 32)
    assert states.keys.shape == states.values.shape == (346, 4, 32)
    assert states.step_queries.shape == (3, 16, 32)
    assert states.step_keys.shape == states.step_values.shape == (3, 4, 32)
    first, second, other = a.load(0), b.load(0), a.load(2)
    for kv, (trace, parts) in enumerate([(first, (0, 1)), (first, (1, 2)), (first, (2, 0)), (other, (0, 1))]):
        for at, part in enumerate(parts):
            columns = slice(at * 16, at * 16 + 16)
            assert torch.equal(states.keys[:200, kv, columns], trace.keys[part].float())
            assert torch.equal(states.values[:200, kv, columns], trace.values[part].float())
            for member, chosen in enumerate((0, 1, 2, at)):
                head = states.queries[:200, 4 * kv + member, columns]
                assert torch.equal(head, trace.queries[part, chosen].float())
    assert torch.equal(states.keys[200:, 0, :16], second.keys[0, 4:].float()), "the second without its sinks"
    assert torch.equal(states.queries[200:, 0, :16], second.queries[0, 0, 4:].float())
    assert torch.equal(states.step_queries[:, 1, :16], second.tests[0, 1, :3].float()), "the last prompt asks"
    assert torch.equal(states.step_keys[:, 0, :16], second.keys[0, -3:].float())


def test_a_shorter_prompt_keeps_its_sinks_and_end(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    extended = ExtendedTraces([a, b], Shape(1, 3, 3, 16), steps=4)
    assert [(folder.name, *rest) for folder, *rest in extended.pieces(100)] == [("a", 0, 4), ("a", 104, 200)]
    assert [rest for _, *rest in extended.pieces(300)] == [[0, 4], [50, 200], [4, 150]]
    keys = extended.states(0, 0, 100, torch.float32).keys
    trace = a.load(0)
    assert torch.equal(keys[:, 1], torch.cat((trace.keys[1, :4], trace.keys[1, 104:])).float())


def test_steps_beyond_those_recorded_are_held_out_and_told(tmp_path: Path) -> None:
    a, b = folders(tmp_path, tests=4)
    extended = ExtendedTraces([a, b], Shape(1, 9, 3, 16), steps=10)
    assert extended.tokens == 200 + 146 - 6
    states, trace = extended.states(0, 0, 194, torch.float32), a.load(0)
    assert torch.equal(states.keys[:, 0], trace.keys[0, :194].float())
    assert torch.equal(states.step_queries[:6, 1], trace.queries[0, 1, 194:].float()), "positions 194 to 199"
    assert torch.equal(states.step_queries[6:, 1], trace.tests[0, 1].float())
    assert torch.equal(states.step_keys[:6, 2], trace.keys[2, 194:].float()), "their own keys"
    assert torch.equal(states.step_keys[6:, 2], trace.keys[2, 190:194].float()), "no file holds those"
    told = extended.describe(194)
    assert (told["steps_from_prompt"], told["query_heads_made_of"], told["kv_heads_side_by_side"]) == (6, 3, 1)
    assert told["pieces"] == [["a", 0, 4], ["a", 4, 194]]


def predicted_folders(tmp_path: Path, tests: int = 4, n: int = 150) -> list[TraceFolder]:
    """Two prompts with layers 0 to 3, of which all but the first have predicted queries."""
    sizes: dict[str, Any] = {"kv_heads": 3, "group": 3, "dim": 16, "tests": tests, "layers": (0, 1, 2, 3), "n": n}
    return [open_folder(write_trace(tmp_path / name, predicted=(1, 2, 3), **sizes)) for name in ("a", "b")]


def test_predicted_queries_are_put_together_as_queries(tmp_path: Path) -> None:
    folders = predicted_folders(tmp_path)
    told = {}
    for layer in (1, 2, 3):  # the same trace with the queries of the steps predicted
        for head, path in folders[1].files[layer].items():
            arrays = random_head(n=150, group=3, dim=16, seed=100 * layer + head)
            arrays["q_predicted"] = np.concatenate((arrays["q"][:, -64:], arrays["q_decode"]), 1)
            np.savez(path, **arrays)
    for steps in (3, 4, 10):
        extended = ExtendedTraces([folders[0], open_folder(folders[1].path)], Shape(4, 16, 4, 32), steps)
        for layer, sequence in ((1, 0), (0, 1), (2, 0)):
            states = extended.states(layer, sequence, 200, torch.float32)
            assert states.step_predicted is not None
            assert torch.equal(states.step_predicted, states.step_queries), f"{steps} steps, layer {layer}"
        told[steps] = extended.describe(200)["predicted_layers"]
    assert told == {3: [1, 2, 3], 4: [1, 2, 3], 10: [1, 2, 3]}


def test_predicted_queries_are_those_of_the_last_prompt(tmp_path: Path) -> None:
    a, b = predicted_folders(tmp_path, tests=0)
    states = ExtendedTraces([a, b], Shape(4, 9, 3, 16), steps=20).states(2, 0, 100, torch.float32)
    trace = a.load(2)
    assert states.step_predicted is not None
    assert trace.predicted is not None
    assert torch.equal(states.step_predicted[:, 5], trace.predicted[1, 2, 44:].float()), "4 before the 16 held out"


def test_no_predicted_queries_where_a_layer_or_a_step_has_none(tmp_path: Path) -> None:
    a, b = predicted_folders(tmp_path)
    extended = ExtendedTraces([a, b], Shape(4, 12, 4, 16), steps=68)
    known = [extended.states(layer, 0, 80, torch.float32).step_predicted is not None for layer in range(4)]
    assert known == [False, True, True, False], "layer 0 has none, and the last takes its fourth kv head from there"
    later = ExtendedTraces([a, b], Shape(4, 12, 4, 16), steps=69)
    assert later.states(1, 0, 80, torch.float32).step_predicted is None, "65 steps from the prompt, 64 are predicted"
    assert (extended.describe(80)["predicted_layers"], later.describe(80)["predicted_layers"]) == ([1, 2, 3], [])


@pytest.mark.parametrize(
    ("layers", "batch", "known"),
    [([0, 1], 1, True), ([1, 2], 2, True), ([1, 3], 2, False), ([1, 0], 1, False), ([2], 1, False)],
)
def test_steps_have_predicted_queries_where_all_layers_but_the_first_do(
    tmp_path: Path, layers: list[int], batch: int, known: bool
) -> None:
    extended = ExtendedTraces(predicted_folders(tmp_path), Shape(4, 6, 2, 16), steps=3)
    prompts = Prompts(extended, layers, batch, 90, 1, "cpu", torch.float32)
    _, steps, _ = fill("full", RetroInferConfig(), prompts, 4)
    assert (steps.predicted is not None) == known
    if steps.predicted is not None:
        assert steps.predicted.shape == steps.queries.shape
        for sequence in range(batch):
            expected = prompts.states(layers[1], sequence).step_predicted
            assert expected is not None
            assert torch.equal(steps.predicted[:, 1, sequence, 0], expected)
        assert not steps.predicted[:, 0].any()


SHAPE = ["--shape", "3,8,2,32", "--layers", "2", "--dtype", "fp32", "--device", "cpu"]
FEW = ["--steps", "3", "--warmup", "1", "--recall_steps", "2", "--set", "attention_aware_graph.top_k=20"]


def call(tmp_path: Path, *words: str) -> int:
    traces = [str(tmp_path / name) for name in ("a", "b")]
    return latency.main(["--traces", *traces, *SHAPE, *FEW, "--output", str(tmp_path / "o.json"), *words])


def written(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "o.json").read_text())


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folders(tmp_path)
    monkeypatch.setattr(latency, "copy_bandwidths", lambda device: {"device": 10.0})
    return tmp_path


def test_a_row_for_every_strategy(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["full", "attention_aware_graph+centroid", "attention_aware_graph+none", "flat+none"]
    assert call(traces, "--strategies", ",".join(names), "--context_len", "300", "--batch", "1,2") == 0
    content = written(traces)
    assert content["protocol"]["shape"] == "3,8,2,32"
    assert [name for name, _ in content["protocol"]["traces"]] == ["a", "b"]
    rows = {(row["batch"], row["name"]): row for row in content["rows"]}
    assert rows.keys() == {(batch, name) for batch in (1, 2) for name in names}
    for (batch, name), row in rows.items():
        layer = row["ms_per_layer"]
        assert row["ms_per_token"] == pytest.approx(3 * layer), "two layers stand for three"
        assert row["tokens_per_second"] == pytest.approx(1e3 * batch / row["ms_per_token"])
        assert sum(row["stage_ms_per_layer"].values()) <= row["ms_per_layer_mean"] * 1.001
        attended, clusters = row["tokens_attended"], row["clusters_estimated"]
        assert row["device_bytes_per_layer"] == pytest.approx((attended + clusters) * batch * 2 * 2 * 32 * 4)
        assert row["roofline_ms_per_layer"] == pytest.approx(row["device_bytes_per_layer"] / 10e6)
        assert row["share_of_roofline"] == pytest.approx(row["roofline_ms_per_token"] / row["ms_per_token"])
        assert row["extended"]["pieces"][-1] == ["b", 4, 150]
        assert not row["extended"]["predicted"]
        assert row["environment"]["packages"]["torch"]
        if name == "full":
            assert attended == 300 + 1 + 2, "the prompt, a step to warm up, the mean of three"
            assert "recall" not in row
            continue
        assert 68 < attended < 300
        assert row["build_seconds_per_layer"]["build"] <= row["fill_seconds_per_layer"]
        assert (clusters > 0) == name.endswith("centroid")
        if name == "flat+none":
            assert (row["recall"], row["keys_scored"]) == (1, 300 - 68)
        else:
            assert row["recall"] > 0.9
            assert row["keys_scored"] < 300
    both = [rows[1, f"attention_aware_graph+{estimation}"] for estimation in ("none", "centroid")]
    assert both[0]["keys_scored"] == both[1]["keys_scored"], "one build, the same steps from the same state"
    assert both[0]["fill_seconds_per_layer"] < both[1]["fill_seconds_per_layer"], "clusters come on top"
    assert capsys.readouterr().out.count("| 300 | 2 |") == len(names)


def test_the_wave_index_and_what_is_dense(traces: Path) -> None:
    words = ["--dense", "--hidden", "24", "--mlp", "40", "--vocab", "50", "--prefill_bsz", "2", "--batch", "2"]
    assert call(traces, "--strategies", "wave_index", "--context_len", "300", *words) == 0
    (row,) = written(traces)["rows"]
    assert row["notes"], "too few tokens to cluster"
    token = row["ms_per_layer"] * 3 + row["head_ms"]
    assert row["ms_per_token"] == pytest.approx(token)
    weights = 3 * 4 * (24 * (8 + 4) * 32 + 24 * 8 * 32 + 3 * 24 * 40) + 4 * 24 * 50
    assert row["roofline_ms_per_token"] == pytest.approx(3 * row["roofline_ms_per_layer"] + weights / 10e6)
    assert min(row["dense_ms_per_layer"], row["head_ms"]) > 0


def test_rows_tell_that_queries_were_predicted(tmp_path: Path) -> None:
    predicted_folders(tmp_path)
    words = "--strategies full --context_len 200 --trace_layers 1-3 --dense --hidden 24 --mlp 40 --vocab 50"
    assert call(tmp_path, *words.split()) == 0
    (row,) = written(tmp_path)["rows"]
    assert (row["extended"]["predicted"], row["extended"]["predicted_layers"]) == (True, [1, 2, 3])


def test_names_of_scans_on_the_gpu() -> None:
    names = "flat+none,flat+centroid@gpu,flat+none@gpu,full,flat+centroid@gpu0.05"
    args = latency.parse_args(["--traces", "unread", "--output", "unread", "--strategies", names])
    variants = [one for build in latency.plan(args, 1000) for one in build]
    found = {one.name: (one.settings.flat.on_gpu, one.settings.flat.scan_share) for one in variants}
    assert found == {
        "flat+none": (False, 1), "full": (False, 1), "flat+centroid@gpu": (True, 1), "flat+none@gpu": (True, 1),
        "flat+centroid@gpu0.05": (True, 0.05),
    }  # fmt: skip
    assert all(one.settings.attention_aware_graph.estimation in one.name for one in variants if "+" in one.name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_beside_a_gpu_rows_come_from_the_host(tmp_path: Path) -> None:
    folders(tmp_path)
    names = "full,wave_index,attention_aware_graph+none,attention_aware_graph+centroid,flat+none"
    words = ["--device", "cuda:0", "--dtype", "bf16", "--strategies", names, "--context_len", "300", "--batch", "1,2"]
    assert call(tmp_path, *words, "--dense", "--hidden", "64", "--mlp", "64", "--vocab", "64") == 0
    rows = written(tmp_path)["rows"]
    assert len(rows) == 10
    for row in rows:
        assert row["copy_gb_per_s"].keys() == {"device", "host"}
        assert (row["host_bytes_per_layer"] > 0) == (row["strategy"] in ("attention_aware_graph", "flat"))
        assert row["device_bytes_per_layer"] > 0


def test_a_dense_models_attention_gets_the_recorded_states() -> None:
    torch.manual_seed(0)
    dense = DenseModel(Shape(2, 4, 2, 8), DenseSizes(16, 24, 30), 2, 3, "cpu", torch.float32)
    sizes = (4, 2, 2)
    steps = StepStates(*(torch.randn(5, 2, 3, 1, heads, 8) for heads in sizes))
    cache = make_cache(
        "full", RetroInferConfig(), layer_num=2, batch_size=3, max_length=9, max_new_length=2, num_key_value_heads=2,
        num_heads=4, head_dim=8, dtype=torch.float32,
    )  # fmt: skip
    prompt = [torch.randn(3, 6, heads, 8) for heads in sizes]
    for layer in range(2):
        cache.prefill_update_kv_cache(*prompt, layer, 0)
    dense.show(steps, 4)
    assert dense.llm.decode_step(dense.tokens, cache).shape == (3, 30)
    for layer in range(2):
        assert torch.equal(cache._keys[layer][:, :, 6], steps.keys[4, layer, :, 0])
        assert torch.equal(cache._values[layer][:, :, 6], steps.values[4, layer, :, 0])
    assert not dense.llm.predicts, "nothing is known to be predicted"
    predicted = torch.randn(5, 2, 3, 1, 4, 8)
    dense.show(replace(steps, predicted=predicted), 3)
    assert dense.llm.predicts
    cos, sin = dense.llm.cos_sin(torch.zeros(3, 1))
    for decoder, expected in zip(dense.layers, predicted[3], strict=True):
        assert torch.equal(decoder.predict_query(torch.randn(3, 1, 16), cos, sin), expected)
    first, second = (layer.qkv.weight for layer in dense.layers)
    assert not torch.equal(first, second), "weights of their own"
    dense.measure(1, 2)
    assert dense.layer_ms > 0 < dense.head_ms


def test_a_profile_of_every_row_is_kept_where_it_is_asked_for(traces: Path) -> None:
    names = "full,attention_aware_graph+centroid"
    assert call(traces, "--strategies", names, "--context_len", "250", "--profile", str(traces / "profiles")) == 0
    for name in ("full", "attention_aware_graph_centroid"):
        path = traces / "profiles" / f"{name}_250_1"
        assert json.loads(path.with_suffix(".json").read_text())["traceEvents"]
        assert "aten::" in path.with_suffix(".txt").read_text()


def test_a_second_call_measures_what_is_missing(traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(traces, "--strategies", "flat+none", "--context_len", "250") == 0
    before = written(traces)["rows"]
    filled = []
    fill = latency.fill
    monkeypatch.setattr(latency, "fill", lambda *given: filled.append((given[0], given[2].length)) or fill(*given))
    assert call(traces, "--strategies", "flat+none,full", "--context_len", "250,300") == 0
    assert filled == [("full", 250), ("flat", 300), ("full", 300)]
    assert written(traces)["rows"][:1] == before


def test_another_protocol_is_refused(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(traces, "--strategies", "full", "--context_len", "250") == 0
    assert call(traces, "--strategies", "full", "--context_len", "250", "--steps", "4") == 2
    assert "steps: 3 there, 4 now" in capsys.readouterr().err


def test_what_does_not_fit_is_left_out_and_told(
    traces: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill = latency.fill

    def full_does_not_fit(*given: Any) -> Any:
        if given[0] == "full":
            raise torch.OutOfMemoryError("no room")
        return fill(*given)

    monkeypatch.setattr(latency, "fill", full_does_not_fit)
    assert call(traces, "--strategies", "full,flat+none", "--context_len", "250") == 2
    assert "no row: full, 250 tokens, batch 1: no room" in capsys.readouterr().err
    assert [row["name"] for row in written(traces)["rows"]] == ["flat+none"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--context_len", "350"],
            "context_len: got 350, allowed: 5 to 346, the tokens of the traces together (2 prom",
        ),
        (["--context_len", "0"], "context_len: got '0', allowed: a comma list of numbers >= 1"),
        (["--shape", "3,8,3,32"], "shape: got 8 heads, allowed: a multiple of the 3 kv heads"),
        (["--shape", "3,8,2"], "shape: got '3,8,2', allowed: layers,heads,kv_heads,head_dim"),
        (["--shape", "3,8,2,24"], "head_dim: got 24, allowed for these traces: 16, 32, 48"),
        (["--shape", "3,8,2,64"], "head_dim: got 64, allowed for these traces: 16, 32, 48"),
        (["--strategies", "fulll"], "strategy: got 'fulll', allowed: full"),
        (["--strategies", "flat+centroid@gpu5"], "strategies: got @gpu5, allowed: @gpu, @gpu0.05 and the like"),
        (["--strategies", "flat@gpux"], "strategies: got @gpux, allowed: @gpu, @gpu0.05 and the like"),
        (["--trace_layers", "3"], "layers: got [3], allowed for"),
        (["--steps", "200", "--context_len", "40"], "steps: got 201, of which 197 positions of"),
        (["--steps", "1100"], "allowed: fewer than 1024 in all, behind which the wave index clusters anew"),
        (["--recall_steps", "4"], "recall_steps: got 4, allowed: 0 to 3 (steps)"),
        (["--device", "cuda:9"], "device: got 'cuda:9', allowed here: cpu"),
        (["--batch", "1,x"], "batch: got '1,x', allowed"),
        (["--layers", "0"], "layers: got 0, allowed: >= 1"),
        (["--traces", "TWICE", "TWICE"], "traces: the same trace is given twice"),
    ],
)
def test_bad_input(words: list[str], message: str, traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(traces / "a") if word == "TWICE" else word for word in words]
    assert call(traces, "--context_len", "100", *words) == 2
    assert message in capsys.readouterr().err
    assert not (traces / "o.json").exists()


def test_traces_that_do_not_go_together(tmp_path: Path) -> None:
    a = open_folder(write_trace(tmp_path / "a", layers=(0,), n=100))
    with pytest.raises(ValueError, match=r"no layer is in all of them \(a: 0; b: 1\)"):
        ExtendedTraces([a, open_folder(write_trace(tmp_path / "b", layers=(1,), n=100))], Shape(1, 3, 1, 32), 2)
    other = open_folder(write_trace(tmp_path / "c", layers=(0,), n=100, dim=16))
    with pytest.raises(ValueError, match=r"\[kv heads, g, d\] of \[\(2, 3, 16\), \(2, 3, 32\)\]"):
        ExtendedTraces([a, other], Shape(1, 3, 1, 32), 2)


def test_the_plot(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert call(traces, "--strategies", "full,flat+none", "--context_len", "200,300", "--batch", "1,2") == 0
    assert latency_plot.main([str(traces / "o.json"), "--output", str(traces / "plot.png")]) == 0
    assert (traces / "plot.png").read_bytes().startswith(b"\x89PNG")
    (traces / "other.json").write_text('{"protocol": {}, "rows": [{"name": "x"}]}')
    assert latency_plot.main([str(traces / "other.json"), "--output", str(traces / "p.png")]) == 2
    assert "allowed: files of benchmark.decode.latency" in capsys.readouterr().err
    assert not (traces / "p.png").exists()
