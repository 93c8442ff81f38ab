"""How a prompt becomes the model's input and where its answer ends: the ways in which published scores were made."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .catalog import NO_CHAT_TEMPLATE

PROTOCOLS = ("official", "retroinfer", "kvcache-factory")
LLAMA_3_TEMPLATE = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
KVCACHE_FACTORY_END_TOKENS = ("<|eot_id|>", "<|end_of_text|>")
# part of the model's name, in any case: most tokens of a prompt; the last that matches holds
KVCACHE_FACTORY_LIMITS = {"llama2": 3950, "llama-2": 3950, "llama3": 7500, "llama-3": 7500, "mistral": 31500}


@dataclass(frozen=True)
class Protocol:
    """A protocol for one model; made by `make_protocol`.

    max_length: tokens of a prompt, from which on its middle is cut out; None cuts nothing. template: "tokenizer",
    "llama-3" or "none". end_ids: tokens that end every answer, none for max_new_tokens each. newline_id ends samsum's
    too. always_a_token: every answer has a token at least, not samsum's alone.
    """

    name: str
    max_length: int | None
    template: str
    end_ids: frozenset[int]
    newline_id: int | None
    always_a_token: bool

    def uses_template(self, dataset: str) -> bool:
        return self.template != "none" and dataset not in NO_CHAT_TEMPLATE

    def stop_ids(self, dataset: str) -> frozenset[int]:
        if dataset == "samsum" and self.newline_id is not None:
            return self.end_ids | {self.newline_id}
        return self.end_ids

    def min_new_tokens(self, dataset: str) -> int:
        return int(self.always_a_token or (dataset == "samsum" and self.newline_id is not None))

    def with_template(self, prompt: str, tokenizer: Any) -> str:
        """The prompt as the user's turn of a chat, up to where the assistant's begins."""
        if self.template == "llama-3":
            return LLAMA_3_TEMPLATE.format(prompt=prompt)
        chat = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def describe(self, tokenizer: Any) -> dict[str, Any]:
        """What must be said beside every score: template, truncation, stop rule."""
        return {
            "protocol": self.name,
            "template": self._describe_template(tokenizer),
            "truncation": self._describe_truncation(),
            "stop": self._describe_stop(),
            "sampling": "greedy, LongBench's max_new_tokens",
        }

    def _describe_template(self, tokenizer: Any) -> str:
        if self.template == "none":
            return "none"
        source = tokenizer.chat_template if self.template == "tokenizer" else LLAMA_3_TEMPLATE
        digest = hashlib.sha256(str(source).encode("utf-8")).hexdigest()[:12]
        whose = "the tokenizer's chat template" if self.template == "tokenizer" else "Llama 3's chat template"
        return f"{whose} (SHA-256 {digest}..), none for {', '.join(sorted(NO_CHAT_TEMPLATE))}"

    def _describe_truncation(self) -> str:
        if self.max_length is None:
            return "none"
        half = int(self.max_length / 2)
        return f"above {self.max_length} tokens: first and last {half} tokens, decoded, before the template"

    def _describe_stop(self) -> str:
        if not self.end_ids:
            return "none: max_new_tokens are always generated"
        told = f"end tokens {sorted(self.end_ids)}; samsum also the newline token {self.newline_id}"
        return f"{told}; at least one new token" + ("" if self.always_a_token else " for samsum")


def make_protocol(
    name: str,
    tokenizer: Any,
    model_name: str,
    eos_ids: Collection[int],
    window: int,
    max_length: int | None = None,
) -> Protocol:
    """The protocol `name` for a model.

    official: THUDM/LongBench's pred.py; the tokenizer's chat template, where it has one. retroinfer: no truncation, no
    template, no end tokens. kvcache-factory: as official with Llama 3's template for tokenizers that have its tokens,
    none for others, its own limits by model name, and at least one token an answer.
    eos_ids: end tokens of tokenizer and generation configuration. window: positions of the model. max_length: tokens of
    a prompt from which on its middle is cut out, instead of the protocol's own.
    Raises ValueError for an unknown protocol, a max_length that the protocol does not use or that leaves no prompt.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: got {name!r}, allowed: {', '.join(PROTOCOLS)}")
    if name == "retroinfer":
        if max_length is not None:
            raise ValueError(f"max_length: got {max_length}, allowed: none, as protocol retroinfer cuts no prompt")
        return Protocol(name, None, "none", frozenset(), None, always_a_token=False)
    end_ids, newline = frozenset(eos_ids), tokenizer.encode("\n", add_special_tokens=False)[-1]
    if name == "official":
        limit = max_length if max_length is not None else default_max_length(window)
        template = "tokenizer" if getattr(tokenizer, "chat_template", None) else "none"
        return Protocol(name, _checked(limit), template, end_ids, newline, always_a_token=False)
    vocabulary = tokenizer.get_vocab()
    named = [limit for part, limit in KVCACHE_FACTORY_LIMITS.items() if part in model_name.lower()]
    limit = max_length if max_length is not None else named[-1] if named else default_max_length(window)
    template = "llama-3" if all(token in vocabulary for token in LLAMA_3_TOKENS) else "none"
    end_ids |= {vocabulary[token] for token in KVCACHE_FACTORY_END_TOKENS if token in vocabulary}
    return Protocol(name, _checked(limit), template, end_ids, newline, always_a_token=True)


def default_max_length(window: int) -> int:
    """LongBench's limits for its models, continued: 3500 for a window of 4096, 7500, 15500, 31500 for 32768."""
    if window < 1024:
        raise ValueError(f"max_length: a window of {window} tokens has no default, give one")
    return 1000 * (window // 1024) - 500


def _checked(max_length: int) -> int:
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}, allowed: an integer >= 2")
    return max_length
