"""The word lists of wonderwords (MIT), read as files of the installed package; its code is not imported."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from itertools import accumulate

from .packages import pinned

PACKAGE = "wonderwords"
VERSION = "2.2.0"
NAME = f"{PACKAGE} {VERSION}"


@dataclass(frozen=True)
class WordLists:
    """Words in the lists' order, repetitions included; `name` states package and version."""

    name: str
    nouns: list[str]
    adjectives: list[str]
    verbs: list[str]

    @cached_property
    def pairs(self) -> Sequence[str]:
        """All "adjective-noun", each once, sorted (6,175,260 in 2.2.0)."""
        return SortedPairs(self.adjectives, self.nouns)

    @cached_property
    def all_words(self) -> list[str]:
        """Nouns, adjectives and verbs, each once, sorted (8,169 in 2.2.0)."""
        return sorted({*self.nouns, *self.adjectives, *self.verbs})


def load_words(any_version: bool = False) -> WordLists:
    """The lists of the installed package.

    Raises ModuleNotFoundError where it is not installed, ValueError for another version than 2.2.0 (its samples would
    differ from published ones) unless `any_version`.
    """
    remedy = f"pip install {PACKAGE}=={VERSION} (--any_wordlist takes any version)"
    package = pinned(PACKAGE, VERSION, remedy, any_version)
    nouns, adjectives, verbs = (_read(package, kind) for kind in ("noun", "adjective", "verb"))
    return WordLists(f"{PACKAGE} {package.version}", nouns, adjectives, verbs)


class SortedPairs(Sequence[str]):
    """sorted({f"{first}-{second}", ..}) without making them all: adjectives that begin with another and a hyphen
    ("blue-eyed" with "blue") share a block, and only such blocks need sorting."""

    def __init__(self, firsts: Iterable[str], seconds: Iterable[str]) -> None:
        self._seconds = sorted(set(seconds))
        blocks: list[list[str]] = []
        for first in sorted(set(firsts), key=lambda word: f"{word}-"):
            if blocks and first.startswith(f"{blocks[-1][0]}-"):
                blocks[-1].append(first)
            else:
                blocks.append([first])
        self._blocks = [block if len(block) == 1 else self._sorted(block) for block in blocks]
        sizes = [len(self._seconds) if len(block) == 1 else len(block) for block in self._blocks]
        self._ends = list(accumulate(sizes))

    def _sorted(self, block: list[str]) -> list[str]:
        return sorted({f"{first}-{second}" for first in block for second in self._seconds})

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        block = bisect_right(self._ends, index)
        at, words = index - (self._ends[block - 1] if block else 0), self._blocks[block]
        return f"{words[0]}-{self._seconds[at]}" if len(words) == 1 else words[at]


def _read(package: metadata.Distribution, kind: str) -> list[str]:
    for file in package.files or ():
        if file.name == f"{kind}list.txt":
            return [line.rstrip() for line in file.read_text(encoding="utf-8").splitlines()]
    raise FileNotFoundError(f"{PACKAGE} {package.version} has no {kind}list.txt")
