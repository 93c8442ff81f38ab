"""Layer numbers on a command line."""

from __future__ import annotations

import re


def parse_layers(text: str) -> list[int]:
    """ "0,3,10-12" is [0, 3, 10, 11, 12]. Raises ValueError for anything else."""
    found: set[int] = set()
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"layers: got {text!r}, allowed: numbers and ranges, such as 0,3,10-12")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)
