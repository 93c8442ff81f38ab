"""Chat templates around a task's template, the singular form of both, and the filling of their slots."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .specs import CHAT_TEMPLATES, STRINGS

TASK_SLOT = "{task_template}"
OWN_TEMPLATES = ("chatml", "tokenizer")
TEMPLATES = (*OWN_TEMPLATES, *CHAT_TEMPLATES)
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class ChatTemplate:
    """The text before and behind the user's message; `tail` ends with the assistant header."""

    name: str
    head: str
    tail: str

    @property
    def text(self) -> str:
        return self.head + TASK_SLOT + self.tail


def choose_template(tokenizer: Any) -> str:
    """Name of the template of the tokenizer's model family: chatml (SmolLM2, Qwen), meta-llama3 (Llama 3.x), else
    tokenizer, its own. Raises ValueError for a tokenizer without a chat template.
    """
    own = getattr(tokenizer, "chat_template", None)
    if not own:
        raise ValueError(f"template: the tokenizer has none of its own; allowed: {', '.join(CHAT_TEMPLATES)}")
    if "<|im_start|>" in own:
        return "chatml"
    return "meta-llama3" if "<|start_header_id|>" in own else "tokenizer"


def chat_template(name: str, tokenizer: Any) -> ChatTemplate:
    """A chat template by name: one of RULER's; "chatml", the tokenizer's own in ChatML with its default system prompt;
    "tokenizer", its own in any format; "auto", see choose_template.

    Raises ValueError for an unknown name, listing the known, and for a tokenizer whose own template is not ChatML.
    """
    name = choose_template(tokenizer) if name == "auto" else name
    if name not in TEMPLATES:
        raise ValueError(f"template: got {name!r}, allowed: auto, {', '.join(TEMPLATES)}")
    if name not in OWN_TEMPLATES:
        return ChatTemplate(name, *CHAT_TEMPLATES[name].split(TASK_SLOT))
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"template: got {name!r}, but the tokenizer has none of its own")
    chat = [{"role": "user", "content": TASK_SLOT}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if name == "chatml" and "<|im_start|>" not in text:
        raise ValueError(f"template: got 'chatml', but the tokenizer's own makes {text[:80]!r}; allowed: tokenizer")
    return ChatTemplate(name, *text.split(TASK_SLOT))


def singular(text: str) -> str:
    """A template about one answer. The replacements know nothing of words and touch the chat template too ("You is a
    helpful AI assistant"): that is how RULER's published prompts are."""
    for plural, single in STRINGS["singular_rewrites_in_order"]:
        text = text.replace(plural, single)
    return text


def fill(template: str, **slots: str) -> str:
    """Puts values into {name} slots. Other braces stay, and values are not searched for slots."""
    return _SLOT.sub(lambda slot: slots.get(slot[1], slot[0]), template)
