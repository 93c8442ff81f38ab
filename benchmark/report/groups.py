"""Folders of one benchmark and model become one group: what a table, and no more than a table, may compare."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from .load import Entry, Folder
from .protocols import mixed_settings

FULL = "full"
Key = tuple[str, int | None, str]  # row, length, task


@dataclass(frozen=True)
class Group:
    """entries: by row, length and task; a row is a strategy, followed by a letter where it was run in several ways.
    base: the row that a row's drop is taken against, by the same key; no item without one. mixed: settings that differ
    between the folders although they should not, empty unless that was allowed. variants: what a letter stands for."""

    benchmark: str
    model: str
    folders: list[Folder]
    entries: dict[Key, Entry]
    base: dict[Key, str]
    mixed: list[str]
    variants: dict[str, str]

    @property
    def rows(self) -> list[str]:
        """Full attention first, the others as the folders have them."""
        return sorted(dict.fromkeys(row for row, _, _ in self.entries), key=lambda row: not is_full(row))

    @property
    def lengths(self) -> list[int | None]:
        return sorted({length for _, length, _ in self.entries}, key=lambda length: length or 0)

    def tasks(self, length: int | None, row: str | None = None) -> list[str]:
        """Tasks at a length, of a row or of any, in the folders' order."""
        everything = dict.fromkeys(task for _, _, task in self.entries)
        present = {task for r, l, task in self.entries if l == length and row in (None, r)}
        return [task for task in everything if task in present]

    @property
    def name(self) -> str:
        """The benchmark as its authors write it."""
        return {"ruler": "RULER", "longbench": "LongBench", "longbench-e": "LongBench-E"}.get(
            self.benchmark.lower(), self.benchmark
        )


def is_full(row: str) -> bool:
    """Whether a row is full attention's."""
    return row.split(" ")[0] == FULL


def group_folders(folders: Sequence[Folder], allow_mixed: bool = False) -> list[Group]:
    """One group for each benchmark and model, in the order of their first folders; a group's folders by length.

    Raises ValueError where folders of a group differ in more than the length, hold different results of one strategy
    under the same settings, or hold different samples of one task, naming what differs. `allow_mixed` lets other
    settings and samples pass: a strategy run in several ways has several rows, and a drop is taken only against full
    attention on the same samples.
    """
    _check_once(folder.path for folder in folders)
    by_name: dict[tuple[str, str], list[Folder]] = {}
    for folder in folders:
        by_name.setdefault((folder.benchmark, folder.model), []).append(folder)
    return [_group(sorted(members, key=lambda f: f.length or 0), allow_mixed) for members in by_name.values()]


def _check_once(paths: Iterable[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"{path}: given twice, allowed: once")
        seen.add(path.resolve())


def _group(folders: list[Folder], allow_mixed: bool) -> Group:
    mixed = mixed_settings(folders)
    benchmark, model = folders[0].benchmark, folders[0].model
    if mixed and not allow_mixed:
        told = "; ".join(f"{key}: {_values(folders, values)}" for key, values in mixed.items())
        raise ValueError(
            f"{benchmark}, {model}: the folders' protocols differ ({told}); --allow_mixed shows them together"
        )
    ways = [", ".join(f"{key}: {values[i]}" for key, values in mixed.items()) for i in range(len(folders))]
    letters = dict(zip(dict.fromkeys(ways), _letters(), strict=False))
    clashing = _clashing(folders, ways)
    entries: dict[Key, Entry] = {}
    own_full: dict[Key, str] = {}
    for folder, way in zip(folders, ways, strict=True):
        labels = {s: f"{s} {letters[way]}" if s in clashing else s for s in folder.results}
        for strategy, by_task in folder.results.items():
            for task, entry in by_task.items():
                key = (labels[strategy], folder.length, task)
                entries.setdefault(key, entry)
                if task in folder.results.get(FULL, {}):
                    own_full.setdefault(key, labels[FULL])
    if not mixed:
        _check_samples(benchmark, entries)
    base = {key: row for key in entries if (row := own_full.get(key) or _some_full(entries, key)) is not None}
    variants = {letter: way for way, letter in letters.items()} if clashing else {}
    return Group(benchmark, model, folders, entries, base, list(mixed), variants)


def _letters() -> Iterator[str]:
    """A to Z, then AA to ZZ."""
    yield from ascii_uppercase
    yield from map("".join, itertools.product(ascii_uppercase, repeat=2))


def _clashing(folders: list[Folder], ways: list[str]) -> set[str]:
    """Strategies that were run in several ways at one length and on one task, with different results."""
    seen: dict[Key, list[tuple[Folder, str, Entry]]] = {}
    clashing = set()
    for folder, way in zip(folders, ways, strict=True):
        for strategy, by_task in folder.results.items():
            for task, entry in by_task.items():
                earlier = seen.setdefault((strategy, folder.length, task), [])
                for other, other_way, result in earlier:
                    if entry.same(result):
                        continue
                    if way == other_way:
                        raise ValueError(
                            f"{folder.file} and {other.file}: different results of strategy {strategy}, task {task} "
                            "under the same settings; give one of them"
                        )
                    clashing.add(strategy)
                earlier.append((folder, way, entry))
    return clashing


def _check_samples(benchmark: str, entries: dict[Key, Entry]) -> None:
    first: dict[tuple[int | None, str], tuple[str, Entry]] = {}
    for (row, length, task), entry in entries.items():
        other, reference = first.setdefault((length, task), (row, entry))
        if told := entry.differing_samples(reference):
            where = f"{benchmark}, task {task}" + (f" at {length} tokens" if length else "")
            raise ValueError(f"{where}: {row} and {other} have different samples ({told})")


def _some_full(entries: dict[Key, Entry], key: Key) -> str | None:
    """The first full attention on the samples of `key`."""
    for (row, length, task), entry in entries.items():
        if is_full(row) and (length, task) == key[1:] and not entry.differing_samples(entries[key]):
            return row
    return None


def _values(folders: list[Folder], values: list[str | None]) -> str:
    return ", ".join(f"{value} in {folder.path}" for folder, value in zip(folders, values, strict=True))
