"""How questions read in training: RULER's words (benchmark/ruler/tasks.json), in the chat wrappers of the adapter."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmark.ruler.chat import fill, singular
from benchmark.ruler.specs import STRINGS, TASKS

END = "<|im_end|>"
NOISE: str = STRINGS["noise"]


@dataclass(frozen=True)
class Wording:
    """A RULER task in parts: `intro`, the context, a newline and `question` are the user's message; `answer_prefix` is
    the beginning of the answer, which stands behind the assistant header."""

    intro: str
    question: str
    answer_prefix: str

    def message(self, context: str) -> str:
        return f"{self.intro}{context}\n{self.question}"


def word_task(task: str, single: bool = False, **slots: str) -> Wording:
    """The wording of a RULER task with its slots filled; `single`: in the singular form, for one answer."""
    rewrite = singular if single else str
    intro, question = rewrite(TASKS[task].template).split("{context}")
    return Wording(
        fill(intro, **slots),
        fill(question, **slots).removeprefix("\n"),
        fill(rewrite(TASKS[task].answer_prefix), **slots),
    )


def word_niah(value_kind: str, keys: list[str], single: bool) -> Wording:
    """The question for the values ("numbers" or "uuids") of `keys`; `single`: there is one value."""
    kind = value_kind[:-1] if single else value_kind
    return word_task("niah_single_1", single, type_needle_v=kind, query=word_list(keys))


def word_needle(value_kind: str, key: str, value: str) -> str:
    """The sentence that states a key's value; its plural stays, as in RULER."""
    return fill(STRINGS["needle"], type_needle_v=value_kind, key=key, value=value)


def word_list(items: list[str]) -> str:
    """ "a", "a, and b", "a, b, and c", .. as RULER writes several queries."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


@dataclass(frozen=True)
class ChatStyle:
    """The text around user messages. `head` opens the first one, `again` every later one, `tail` closes both."""

    share: float
    head: str
    again: str
    tail: str

    def first(self, message: str) -> str:
        return self.head + message + self.tail

    def later(self, message: str) -> str:
        return self.again + message + self.tail


_SYSTEM = f"<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face{END}\n"
_USER = "<|im_start|>user\n"
_ASSISTANT = f"{END}\n<|im_start|>assistant\n"

# Beside the model's own format: formats that RULER runs use with it, and the system prompt in RULER's singular form.
STYLES = {
    "chatml": ChatStyle(0.80, _SYSTEM + _USER, f"\n{_USER}", _ASSISTANT),
    "no system prompt": ChatStyle(0.08, _USER, f"\n{_USER}", _ASSISTANT),
    "meta-chat": ChatStyle(0.04, "[INST] ", "\n[INST] ", " [/INST]"),
    "base": ChatStyle(0.04, "", "\n\n", ""),
    "singular system prompt": ChatStyle(0.04, singular(_SYSTEM) + _USER, f"\n{_USER}", _ASSISTANT),
}


def choose_style(rng: random.Random) -> ChatStyle:
    """A style, drawn by the shares."""
    return rng.choices(list(STYLES.values()), [style.share for style in STYLES.values()])[0]
