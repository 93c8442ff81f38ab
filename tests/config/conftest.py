"""A folder of configuration files of a test's own, in place of config/*.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """write_config(content) makes `content` (bytes, or anything JSON can hold) the file of the model "org/tiny"."""
    monkeypatch.setattr("config.config.CONFIG_DIR", tmp_path)

    def write(content: Any) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / "tiny.json").write_bytes(raw)

    return write
