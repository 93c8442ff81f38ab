"""Needle prompts: one sentence hidden in real text or in noise, asked for at the end (RULER niah_single_1 and _2)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parent / "text" / "alice_in_wonderland.txt"
HAYSTACKS = ("text", "noise")
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ASK = "\nWhat is the special magic number for"
_COLOURS = ("amber", "crimson", "emerald", "golden", "indigo", "ivory", "scarlet", "silver", "turquoise", "violet")
_THINGS = ("anchor", "candle", "feather", "harbor", "lantern", "marble", "orchard", "pebble", "saddle", "violin")


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt that ends in the beginning of its answer; the model is to go on with `answer`."""

    text: str
    answer: str
    depth: float
    haystack: str

    @property
    def document(self) -> str:
        """The prompt without its question."""
        return self.text[: self.text.rindex(_ASK)]

    @property
    def question(self) -> str:
        """All that follows the document: the question and the beginning of its answer."""
        return self.text[self.text.rindex(_ASK) :]


def needle_prompt(tokenizer: Any, tokens: int, depth: float, haystack: str = "text", seed: int = 2025) -> NeedlePrompt:
    """The longest prompt of at most `tokens` tokens with the needle at `depth` (0 = start, 1 = end) of the haystack,
    in text behind the end of a sentence.

    Raises ValueError for an unknown haystack, a depth outside [0, 1], or too few tokens for the question alone.
    """
    if haystack not in HAYSTACKS:
        raise ValueError(f"haystack: got {haystack!r}, allowed: {', '.join(HAYSTACKS)}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth: got {depth}, allowed: 0 to 1")
    rng = random.Random(f"{seed}/{depth}/{haystack}")
    key = f"{rng.choice(_COLOURS)}-{rng.choice(_THINGS)}"
    answer = str(rng.randint(1_000_000, 9_999_999))
    units, join = (_words(tokens), " ") if haystack == "text" else ([_NOISE] * (tokens // 8), "\n")
    needle = f"One of the special magic numbers for {key} is: {answer}."

    def prompt(count: int) -> str:
        at = round(count * depth)
        while haystack == "text" and 0 < at < count and not units[at - 1].endswith((".", "!", "?")):
            at -= 1
        return _question(tokenizer, key, join.join([*units[:at], needle, *units[at:count]]))

    def fits(count: int) -> bool:
        return len(tokenizer(prompt(count), add_special_tokens=False).input_ids) <= tokens

    if not fits(0):
        raise ValueError(f"context_len: got room for {tokens} tokens, which the question alone exceeds")
    low, high = 0, len(units)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return NeedlePrompt(prompt(low), answer, depth, haystack)


def question_frame(tokenizer: Any) -> tuple[str, str]:
    """What stands before and after a question about the document of a needle prompt."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n", ""
    chat = [{"role": "user", "content": _ASK}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return "\n", text.partition(_ASK.strip())[2]


def _words(tokens: int) -> list[str]:
    """The text's words, repeated until they are more than `tokens`, as a word is a token at least."""
    words = TEXT.read_text(encoding="utf-8").split()
    return words * (1 + tokens // len(words))


def _question(tokenizer: Any, key: str, context: str) -> str:
    user = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\n{context}{_ASK} {key} mentioned in the provided text?"
    )
    prefix = f" The special magic number for {key} mentioned in the provided text is"
    if not getattr(tokenizer, "chat_template", None):
        return user + prefix
    chat = [{"role": "user", "content": user}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + prefix
