"""The prose that needles are hidden in: documents as sentences whose token counts are known."""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]?\s+(?=[\"'(\[A-Z0-9])")


@dataclass(frozen=True)
class Document:
    """`tokens[i]`: tokens of a blank and `sentences[i]`."""

    source: str
    sentences: list[str]
    tokens: list[int]


@dataclass(frozen=True)
class Corpus:
    """Documents; longer ones are drawn from more often."""

    documents: list[Document]

    @classmethod
    def of_texts(cls, texts: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> Corpus:
        """From (source, text) pairs. The cut between sentences only decides where needles may go."""
        documents = []
        for source, text in texts:
            sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence]
            encoded = tokenizer.encode_batch([f" {sentence}" for sentence in sentences], add_special_tokens=False)
            documents.append(Document(source, sentences, [len(sentence.ids) for sentence in encoded]))
        return cls(documents)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """Reads what `save` wrote. FileNotFoundError tells how to make the file, ValueError that it is no corpus."""
        if not path.is_file():
            raise FileNotFoundError(
                f"corpus: {path} does not exist; python -m benchmark.probe_model.prepare_corpus makes it"
            )
        try:
            return cls([Document(**document) for document in json.loads(lzma.decompress(path.read_bytes()))])
        except (lzma.LZMAError, json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"corpus: {path} is not a file of prepare_corpus ({error})") from None

    def save(self, path: Path) -> None:
        """Writes all documents as xz-compressed JSON."""
        documents = [vars(document) for document in self.documents]
        path.write_bytes(lzma.compress(json.dumps(documents).encode()))

    @cached_property
    def _weights(self) -> list[int]:
        return [sum(document.tokens) for document in self.documents]

    def passage(self, rng: random.Random, most_tokens: int) -> list[str]:
        """Consecutive sentences from a random place, then from others where a document ends, in `most_tokens`."""
        sentences: list[str] = []
        left = most_tokens
        while left > 0:
            document = self.documents[rng.choices(range(len(self.documents)), self._weights)[0]]
            place = rng.randrange(len(document.sentences))
            while place < len(document.sentences) and document.tokens[place] <= left:
                sentences.append(document.sentences[place])
                left -= document.tokens[place]
                place += 1
            if place < len(document.sentences):
                break
        return sentences
