"""Counting tokens, through a fast tokenizer's own backend where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    """A function from a text to the number of its tokens, none added."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
    # encode_batch_fast keeps no offsets: 1.6 times as fast
    return lambda text: len(backend.encode_batch_fast([text], add_special_tokens=False)[0])


def adds_special_tokens(tokenizer: Any, prompt: str) -> bool:
    """Whether the tokenizer is to add its own special tokens: not where the prompt states its first one in text."""
    first = getattr(tokenizer, "bos_token", None)
    return not (first and prompt.startswith(first))


def special_token_count(tokenizer: Any) -> int:
    """How many special tokens a tokenizer adds to a text."""
    return len(tokenizer("a").input_ids) - len(tokenizer("a", add_special_tokens=False).input_ids)
