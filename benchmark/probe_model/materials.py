"""What all training sequences are made of: the tokenizer, the word lists, and prose."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from benchmark.ruler.words import WordLists, load_words

from .corpus import Corpus
from .wording import END

_WORDS_SEED = 42


@dataclass(frozen=True)
class Materials:
    """`words` are those that RULER draws its keys from."""

    tokenizer: Tokenizer
    words: WordLists
    corpus: Corpus

    @classmethod
    def load(cls, tokenizer: Path, corpus: Path) -> Materials:
        """Reads a tokenizer.json and a file of prepare_corpus. Raises as Corpus.load and load_words do."""
        return cls(Tokenizer.from_file(str(tokenizer)), load_words(), Corpus.load(corpus))

    @cached_property
    def end_id(self) -> int:
        token = self.tokenizer.token_to_id(END)
        if token is None:
            raise ValueError(f"tokenizer: has no {END}; allowed: the default model's")
        return token

    @cached_property
    def common_words(self) -> list[str]:
        """All words in a fixed random order."""
        words = list(self.words.all_words)
        random.Random(_WORDS_SEED).shuffle(words)
        return words

    def encode(self, text: str) -> list[int]:
        """Token ids, none added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def new_key(self, rng: random.Random, kind: str) -> str:
        """A needle's key; kind: "words" (adjective-noun) or "uuids"."""
        if kind == "words":
            return f"{rng.choice(self.words.adjectives)}-{rng.choice(self.words.nouns)}"
        return _uuid(rng)

    def near_key(self, rng: random.Random, key: str) -> str:
        """A key that shares its adjective or its noun with `key`."""
        adjective, noun = key.rsplit("-", 1)
        if rng.random() < 0.5:
            return f"{adjective}-{rng.choice(self.words.nouns)}"
        return f"{rng.choice(self.words.adjectives)}-{noun}"

    def new_value(self, rng: random.Random, kind: str) -> str:
        """A needle's value; kind: "numbers" (7 digits) or "uuids"."""
        return str(rng.randint(10**6, 10**7 - 1)) if kind == "numbers" else _uuid(rng)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
