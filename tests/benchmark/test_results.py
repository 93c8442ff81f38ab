"""Results are written whole or not at all, and say where they come from."""

import json
import os
from pathlib import Path

import pytest

from benchmark.results import check_writable, environment, write_json


def test_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_full_disk_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["out.json"]


def test_an_unwritable_output_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allowed: a file"):
        check_writable(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        check_writable(tmp_path / "missing" / "out.json")
    check_writable(tmp_path / "out.json")
    assert os.listdir(tmp_path) == []


def test_environment_names_hardware_versions_and_commit() -> None:
    found = environment()
    assert found["packages"]["torch"]
    assert found["threads"] >= 1
    assert "commit" in found
