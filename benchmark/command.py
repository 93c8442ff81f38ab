"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_status(name: str, work: Callable[[], str | None]) -> int:
    """Does the work and prints what it returns: 0; one line on stderr where it cannot be done as asked: 2."""
    try:
        text = work()
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    if text is not None:
        print(text)
    return 0
