"""The kernel tests through Triton's interpreter, in a process of its own.

The interpreter must be chosen before Triton is imported, and other rooms' tests import it with transformers. To see
single tests: TRITON_INTERPRET=1 python -m pytest tests/attn_hub -k interpreted
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is a GPU")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    root = folder.parents[1]
    arguments = [
        str(folder),
        f"--confcutdir={folder}",
        "-k",
        "interpreted and not test_kernels_in_the_interpreter",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr


def test_importing_attn_hub_does_not_import_triton():
    """So that the caller may still choose the interpreter, and a CPU needs no Triton."""
    program = "import sys, attn_hub; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0
