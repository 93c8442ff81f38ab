"""RULER's chat templates: which one a tokenizer gets, where the answer prefix stands, the singular form, slots."""

import json
from typing import Any

import pytest
from ruler_cases import CHAT, SHARED, Pieces, setting

from benchmark.ruler.chat import TEMPLATES, chat_template, choose_template, fill, singular
from benchmark.ruler.samples import make_rows
from benchmark.ruler.specs import CHAT_TEMPLATES, FREE_TASKS, STRINGS, TASKS, parse_tasks
from benchmark.ruler.tokens import adds_special_tokens, special_token_count, token_counter
from model_hub import load_tokenizer


class Named(Pieces):
    """A tokenizer with any chat template, and a begin token that it adds itself."""

    def __init__(self, own: str | None, first: str | None = None) -> None:
        self.chat_template = own
        self.bos_token = first

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = super().__call__(text).input_ids
        return type("Encoding", (), {"input_ids": ["<bos>", *ids] if add_special_tokens else ids})


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ("{{ '<|im_start|>' }}", "chatml"),
        ("<|begin_of_text|><|start_header_id|>", "meta-llama3"),
        ("<|User|>", "tokenizer"),
    ],
)
def test_the_family_chooses_the_template(own: str, name: str) -> None:
    assert choose_template(Named(own)) == name


def test_the_default_models_template_is_what_its_adapter_was_trained_with() -> None:
    try:
        tokenizer = load_tokenizer("SmolLM2-135M-Instruct")
    except RuntimeError as error:
        pytest.skip(str(error))
    chat = chat_template("auto", tokenizer)
    assert chat.name == "chatml"
    assert chat.head == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n"
    )
    assert chat.tail == "<|im_end|>\n<|im_start|>assistant\n"
    assert not adds_special_tokens(tokenizer, chat.text)
    count = token_counter(tokenizer)
    for text in ("", "Hello  there\n", chat.text, "naïve — 12345 " * 50):
        assert count(text) == len(tokenizer(text, add_special_tokens=False).input_ids)


def test_the_answer_prefix_follows_the_assistant_header() -> None:
    chat = chat_template("meta-llama3", Named(None))
    row = make_rows(setting("vt", 2048, chat=chat), 1)[0]
    assert row["input"].startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nMemorize and track")
    assert row["input"].endswith("in the text above.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert row["answer_prefix"].startswith(" Answer: According to")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_template_holds_the_task_once(name: str) -> None:
    chat = chat_template(name, Named(None))
    assert chat.text == CHAT_TEMPLATES[name]
    assert chat.text.count("{task_template}") == 1


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("llama2", None, "template: got 'llama2', allowed: auto, chatml, tokenizer, base, meta-chat"),
        ("auto", None, "template: the tokenizer has none of its own; allowed: base, meta-chat"),
        ("tokenizer", None, "template: got 'tokenizer', but the tokenizer has none of its own"),
    ],
)
def test_bad_templates_are_refused(name: str, own: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_template(name, Named(own))
    assert name in TEMPLATES or name in ("llama2", "auto")


def test_chatml_is_refused_for_a_tokenizer_of_another_format() -> None:
    tokenizer = Named("x")
    tokenizer.apply_chat_template = lambda *_, **__: "<user>{task_template}<bot>"  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="got 'chatml', but the tokenizer's own makes '<user>"):
        chat_template("chatml", tokenizer)
    assert chat_template("tokenizer", tokenizer).head == "<user>"


def test_the_begin_token_is_added_once_and_counted() -> None:
    tokenizer = Named(None, "<|begin_of_text|>")
    assert adds_special_tokens(tokenizer, chat_template("meta-chat", tokenizer).text)
    assert not adds_special_tokens(tokenizer, chat_template("meta-llama3", tokenizer).text)
    assert special_token_count(tokenizer) == 1
    assert special_token_count(Pieces()) == 0


def test_singular_rewrites_in_order() -> None:
    assert singular("Some are all here, answers are there, care") == "A is here, answer is there, cis"


def test_fill_leaves_other_braces_and_values_alone() -> None:
    assert fill("{a} {b} {{c}} {", a="{b}", b="x") == "{b} x {{c}} {"


def test_task_names() -> None:
    assert parse_tasks("all") == list(TASKS)
    assert len(TASKS) == 13
    free = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"]
    assert parse_tasks("free") == FREE_TASKS == free
    assert parse_tasks("vt, niah_single_1,vt") == ["niah_single_1", "vt"]
    with pytest.raises(ValueError, match=r"task: got 'vtt', allowed: all, free, or some of niah_single_1, .*qa_2"):
        parse_tasks("vt,vtt")


def test_the_facts_are_the_references() -> None:
    path = SHARED / "templates.json"
    if not path.exists():
        pytest.skip("../shared/data/ruler is not there")
    reference = json.loads(path.read_text(encoding="utf-8"))
    assert reference["chat_templates"] == CHAT_TEMPLATES
    assert reference["strings"] == STRINGS
    for name, spec in TASKS.items():
        stated = reference["templates"][spec.generator]
        assert (spec.template, spec.answer_prefix) == (stated["template"], stated["answer_prefix"])
        assert (spec.new_tokens, spec.metric) == (stated["tokens_to_generate"], stated["metric"])
        arguments = reference["tasks"][name]["args"]
        assert set(map(str, arguments.values())) - {"noise", "1"} <= set(map(str, spec.args.values()))


def test_the_worked_examples_are_inside_and_outside_the_chat_template() -> None:
    tracking = make_rows(setting("vt", 4096), 1)[0]["input"]
    assert tracking.count(CHAT.head) == 1
    assert tracking.count("Memorize and track") == 2
    common = make_rows(setting("cwe", 4096), 1)[0]["input"]
    assert common.count(CHAT.head) == 2
    assert common.count(CHAT.tail) == 2
