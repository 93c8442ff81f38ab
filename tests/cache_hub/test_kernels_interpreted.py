"""The kernel tests of this room through Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is a GPU")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's")
def test_kernels_in_the_interpreter() -> None:
    """The interpreter must be chosen before Triton is imported, which other tests do."""
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    root = folder.parents[1]
    chosen = [str(folder), f"--confcutdir={folder}", "-k", "interpreted and not test_kernels_in_the_interpreter"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen, "-q", "-p", "no:cacheprovider"],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr
