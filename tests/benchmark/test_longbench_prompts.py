"""LongBench's prompts: format, truncation in the middle, templates and stop rules of every protocol."""

import os
from typing import Any

import pytest
from longbench_samples import SAMPLES, WordTokenizer, make_record

from benchmark.LongBench.catalog import DATASETS, MAX_NEW_TOKENS, METRIC, NO_CHAT_TEMPLATE
from benchmark.LongBench.prompting import check_room, format_prompt, make_task, truncate_middle
from benchmark.LongBench.protocols import LLAMA_3_TOKENS, Protocol, default_max_length, make_protocol
from benchmark.LongBench.records import read_dataset
from benchmark.LongBench.scoring import score_dataset
from model_hub import load_tokenizer

LLAMA_3 = (*LLAMA_3_TOKENS, "<|end_of_text|>")


def protocol(name: str = "official", tokenizer: Any = None, **options: Any) -> Protocol:
    given = {"model_name": "some/model", "eos_ids": {1}, "window": 8192, **options}
    return make_protocol(name, tokenizer or WordTokenizer(), **given)


def sample(dataset: str, rules: Protocol, tokenizer: Any, **changes: Any) -> Any:
    return make_task(dataset, [make_record(dataset, 0, **changes)], tokenizer, rules).samples[0]


@pytest.mark.parametrize(
    ("max_length", "kept"),
    [
        (11, "one two three four five six seven eight nine ten"),  # with the begin token: not longer than the limit
        (10, "one two three fourseven eight nine ten".replace("fourseven", "foursix seven")),
        (9, "one two threeseven eight nine ten"),  # odd: int(9 / 2) = 4 at each end, the begin token is one of them
        (8, "one two threeseven eight nine ten"),
        (2, "ten"),  # the first token is the begin token, which is not decoded
    ],
)
def test_truncation_keeps_both_ends(max_length: int, kept: str) -> None:
    text = "one two three four five six seven eight nine ten"
    assert truncate_middle(WordTokenizer(), text, max_length) == (kept, max_length < 11)


def test_nothing_is_cut_without_a_limit() -> None:
    assert truncate_middle(WordTokenizer(), "word " * 100, None) == ("word " * 100, False)


def test_prompts_are_cut_before_the_template() -> None:
    tokenizer = WordTokenizer()
    made = sample("qasper", protocol(max_length=20), tokenizer, context="filler " * 100)
    assert made.prompt.startswith("<user> You are given a scientific article and a")
    assert made.prompt.endswith("Question: question 0 \n \n Answer: <assistant>")
    assert made.extra["truncated"]
    assert "filler" not in made.prompt


def test_braces_in_a_record_stay_as_they_are() -> None:
    record = make_record("lcc", 0, context="def f(): return {input}{0}\n", input="")
    assert format_prompt("lcc", record) == (
        "Please complete the code given below. \ndef f(): return {input}{0}\nNext line of code:\n"
    )


@pytest.mark.parametrize("dataset", DATASETS)
def test_official_samples(dataset: str) -> None:
    tokenizer = WordTokenizer()
    record = make_record(dataset)
    made = sample(dataset, protocol(tokenizer=tokenizer), tokenizer)
    plain = format_prompt(dataset, record)
    assert record["context"] in plain
    if dataset in NO_CHAT_TEMPLATE:
        assert (made.prompt, made.special_tokens) == (plain, True)
    else:
        assert (made.prompt, made.special_tokens) == (f"<user> {plain} <assistant>", False)
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    assert made.stop_ids == ({1, newline} if dataset == "samsum" else {1})
    assert made.min_new_tokens == (1 if dataset == "samsum" else 0)
    assert made.max_new_tokens == MAX_NEW_TOKENS[dataset]
    assert (made.id, made.expected) == (record["_id"], record["answers"])
    assert made.extra["all_classes"] == record["all_classes"]


def test_official_without_a_chat_template() -> None:
    rules = protocol(tokenizer=WordTokenizer(chat_template=None))
    made = sample("qasper", rules, WordTokenizer(chat_template=None))
    assert (made.prompt, made.special_tokens) == (format_prompt("qasper", make_record("qasper")), True)
    assert rules.describe(WordTokenizer(chat_template=None))["template"] == "none"


def test_retroinfer_neither_cuts_nor_stops() -> None:
    tokenizer = WordTokenizer()
    rules = protocol("retroinfer", window=1024)
    for dataset in ("qasper", "samsum"):
        made = sample(dataset, rules, tokenizer, context="word " * 5000)
        assert made.prompt == format_prompt(dataset, make_record(dataset, 0, context="word " * 5000))
        assert (made.stop_ids, made.min_new_tokens, made.special_tokens) == (frozenset(), 0, True)
    told = rules.describe(tokenizer)
    assert (told["template"], told["truncation"]) == ("none", "none")
    assert told["stop"] == "none: max_new_tokens are always generated"
    with pytest.raises(ValueError, match="max_length: got 500, allowed: none, as protocol retroinfer cuts no prompt"):
        protocol("retroinfer", max_length=500)


def test_kvcache_factory_takes_llama_3s_template_and_end_tokens() -> None:
    tokenizer = WordTokenizer(special=LLAMA_3)
    rules = protocol("kvcache-factory", tokenizer, model_name="meta-llama/Meta-Llama-3-8B-Instruct")
    made = sample("qasper", rules, tokenizer)
    plain = format_prompt("qasper", make_record("qasper"))
    assert made.prompt == (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{plain}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert not made.special_tokens
    vocabulary = tokenizer.get_vocab()
    assert made.stop_ids == {1, vocabulary["<|eot_id|>"], vocabulary["<|end_of_text|>"]}
    assert made.min_new_tokens == 1
    assert rules.max_length == 7500
    assert sample("trec", rules, tokenizer).special_tokens


def test_kvcache_factory_with_other_models() -> None:
    rules = protocol("kvcache-factory", window=32768, model_name="Qwen/Qwen2.5-7B-Instruct")
    assert (rules.template, rules.max_length) == ("none", 31500)
    assert protocol("kvcache-factory", model_name="x/Llama-2-7b-chat-hf").max_length == 3950
    assert protocol("kvcache-factory", model_name="x/Mistral-7B", window=32768).max_length == 31500
    assert protocol("kvcache-factory", model_name="x/Mistral-7B", max_length=100).max_length == 100


@pytest.mark.parametrize(
    ("window", "limit"), [(4096, 3500), (8192, 7500), (16384, 15500), (32768, 31500), (65536, 63500), (131072, 127500)]
)
def test_limits_leave_room_for_template_and_answer(window: int, limit: int) -> None:
    assert default_max_length(window) == limit
    assert window - limit >= max(MAX_NEW_TOKENS.values()) + 80


def test_bad_protocols_are_refused() -> None:
    with pytest.raises(ValueError, match="protocol: got 'ruler', allowed: official, retroinfer, kvcache-factory"):
        protocol("ruler")
    with pytest.raises(ValueError, match="max_length: got 1, allowed: an integer >= 2"):
        protocol(max_length=1)
    with pytest.raises(ValueError, match="a window of 512 tokens has no default"):
        protocol(window=512)


def test_a_protocol_states_template_truncation_and_stop() -> None:
    told = protocol(max_length=7501).describe(WordTokenizer())
    assert told["protocol"] == "official"
    assert told["template"].startswith("the tokenizer's chat template (SHA-256 ")
    assert told["template"].endswith("none for lcc, lsht, repobench-p, samsum, trec, triviaqa")
    assert told["truncation"] == "above 7501 tokens: first and last 3750 tokens, decoded, before the template"
    assert told["stop"] == "end tokens [1]; samsum also the newline token 2; at least one new token for samsum"


def test_a_prompt_that_does_not_fit_is_named_before_the_run() -> None:
    tokenizer = WordTokenizer()
    tasks = [make_task("qasper", [make_record("qasper", 5)], tokenizer, protocol("retroinfer"))]
    check_room(tasks, tokenizer, 1024)
    with pytest.raises(
        ValueError, match=r"qasper, sample qasper-5: \d+ tokens and 128 new ones do not fit into .* 200"
    ):
        check_room(tasks, tokenizer, 200)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/data/longbench/samples beside the repository")
@pytest.mark.parametrize("dataset", DATASETS)
def test_real_samples(dataset: str) -> None:
    """They format, have LongBench's length and splits, and their own answers score 100."""
    records, skipped = read_dataset(SAMPLES, dataset)
    assert not skipped
    for record in records:
        prompt = format_prompt(dataset, record)
        assert record["context"] in prompt
        assert record["input"] in prompt
        assert record["length"] == counted_length(record)
        assert SPLITS.get(dataset, lambda record: True)(record)
    pytest.importorskip({"code_sim": "fuzzywuzzy", "rouge": "rouge", "rouge_zh": "jieba"}.get(METRIC[dataset], "json"))
    pytest.importorskip("jieba" if dataset.endswith("_zh") else "json")
    perfect = [{**record, "pred": record["answers"][-1], "expected": record["answers"]} for record in records]
    assert score_dataset(dataset, perfect) == 100


SPLITS: dict[str, Any] = {
    "trec": lambda record: record["input"].startswith("Question: ") and record["input"].endswith("\nType:"),
    "samsum": lambda record: record["input"].endswith("\nSummary: ") and record["context"].endswith("\n"),
    "triviaqa": lambda record: record["input"].startswith("Passage:\n") and record["input"].endswith("\nAnswer:\n"),
    "lcc": lambda record: record["input"] == "" and record["context"].endswith("\n"),
}


def counted_length(record: dict[str, Any]) -> int:
    """LongBench's length: words, or characters of Chinese, of input, context and answers."""
    texts = [record["input"], record["context"], *record["answers"]]
    if record["language"] != "zh":
        return sum(len(text.split()) for text in texts)
    if record["dataset"] == "passage_retrieval_zh":
        return len(record["input"]) + len(record["context"]) + 1
    return sum(map(len, texts))


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no ../shared/data/longbench/samples beside the repository")
def test_real_samples_through_a_real_tokenizer() -> None:
    try:
        tokenizer = load_tokenizer("SmolLM2-135M-Instruct")
    except RuntimeError as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))
    rules = protocol(tokenizer=tokenizer, window=4096)
    for dataset in ("gov_report", "lsht", "triviaqa"):
        records = read_dataset(SAMPLES, dataset)[0]
        task = make_task(dataset, records, tokenizer, rules)
        check_room([task], tokenizer, 4096)
        for made, record in zip(task.samples, records, strict=True):
            plain = format_prompt(dataset, record)
            assert made.extra["truncated"]
            assert ("<|im_start|>user\n" in made.prompt) == (dataset == "gov_report")
            inner = made.prompt.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0] or made.prompt
            assert inner[:500] == plain[:500]
            assert inner[-500:] == plain[-500:]
