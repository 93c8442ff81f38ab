"""RULER's samples: lengths, needles, depths, answers, repeatability, for every task at 1K to 128K.

The shortest sample of a task falls short of its length by at most 1.25 steps of units (upstream takes off a whole step
from one that is too long) and 2 % for what random words weigh, 8 % in cwe, where ten words make a third of the text;
fwe, sized by its own steps, by 20 %.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from ruler_cases import ALICE, CHAT, ROOT, SHARED, pieces, setting, words

from benchmark.ruler.chat import chat_template
from benchmark.ruler.niah import DEPTHS
from benchmark.ruler.samples import GENERATORS, make_rows
from benchmark.ruler.sources import Sources
from benchmark.ruler.specs import STRINGS, TASKS
from benchmark.ruler.tokens import token_counter
from model_hub import load_tokenizer

NIAH = [task for task in TASKS if task.startswith("niah")]
LENGTHS = [1024, 2048, 4096, 16384]
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+|\S+ \S+) is: (\S+)\.")
IMPOSSIBLE = {("qa_2", 1024)}


def made(task: str, length: int, samples: int = 8, **changes: Any) -> list[dict[str, Any]]:
    return make_rows(setting(task, length, **changes), samples)


def shortfall(task: str, length: int, count: Any = pieces) -> float:
    """Tokens by which the shortest sample may fall short."""
    if task == "fwe":
        return 0.2 * length
    generator = GENERATORS[TASKS[task].generator](setting(task, length, count=count))
    sizes = [count(generator.draft(units).prompt) for units in (generator.step, 3 * generator.step)]
    return 1.25 * (sizes[1] - sizes[0]) / 2 + (0.08 if task == "cwe" else 0.02) * length


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_samples_fill_their_length_and_hold_their_answers(task: str, length: int) -> None:
    if (task, length) in IMPOSSIBLE:
        pytest.skip("ten documents do not fit")
    rows = made(task, length)
    assert [row["index"] for row in rows] == list(range(8))
    for row in rows:
        prompt = row["input"] + row["answer_prefix"]
        assert row["length"] == pieces(prompt) + TASKS[task].new_tokens <= length
        assert row["length"] == row["length_w_model_temp"]
        assert row["outputs"]
        assert all(answer in row["input"] for answer in row["outputs"])
        assert row["input"].endswith(CHAT.tail)
        assert "{" not in prompt
    assert min(row["length"] for row in rows) >= length - shortfall(task, length)


@pytest.mark.parametrize("task", TASKS)
def test_128k_with_a_tokenizer_of_words(task: str) -> None:
    rows = made(task, 131072, samples=2, count=words)
    lengths = [row["length"] for row in rows]
    assert max(lengths) <= 131072
    if task == "cwe":  # the word lists end before the context does: 10 x 30 + 8,159 x 3 numbered words
        assert all(len(re.findall(r"\d+\. ", row["input"])) > 24_000 for row in rows)
    else:
        assert min(lengths) >= 131072 - shortfall(task, 131072, words)
    assert all(answer in row["input"] for row in rows for answer in row["outputs"])


@pytest.mark.parametrize("sizing", ["bisect", "step"])
@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(task: str, sizing: str) -> None:
    one, again, other = (json.dumps(made(task, 4096, 3, sizing=sizing, seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_bytes_do_not_depend_on_the_process() -> None:
    pytest.importorskip("wonderwords")
    program = (
        "import hashlib, json\n"
        "from pathlib import Path\n"
        "from ruler_cases import setting\n"
        "from benchmark.ruler.samples import make_rows\n"
        "tasks = ('niah_multikey_2', 'vt', 'cwe', 'fwe', 'qa_1', 'qa_2')\n"
        "rows = [make_rows(setting(task, 4096), 2) for task in tasks]\n"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'benchmark'}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("task", NIAH)
def test_needles_are_counted_placed_and_asked_for(task: str) -> None:
    args = TASKS[task].args
    keys = max(args["keys"], args["queries"])
    depths = []
    for row in made(task, 4096, samples=20):
        text = row["input"]
        found = NEEDLE.findall(text)
        answering = [match for match in found if match[2] in row["outputs"]]
        assert len(row["outputs"]) == args["queries"] * args["values"]
        assert Counter(match[2] for match in answering) == Counter(row["outputs"])
        asked = {match[1] for match in answering}
        assert len(asked) == args["queries"]
        question = text[text.rindex("What ") :]
        assert all(key in question and key in row["answer_prefix"] for key in asked)
        if args["haystack"] == "needle":
            assert len(found) > 20
        else:
            assert len(found) == keys * args["values"]
        assert {match[0] for match in found} == {args["value"]}
        assert row["token_position_answer"] == pieces(text[: text.index(row["outputs"][0])])
        start, end = text.index("afterwards.\n"), text.rindex("\nWhat ")
        depths += [(text.index(value) - start) / (end - start) for value in row["outputs"]]
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_values_and_keys_have_their_forms() -> None:
    forms = {
        "numbers": r"[1-9]\d{6}",
        "words": r"\S+(?: hoc)?-\S+",
        "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    }
    for task in NIAH:
        args = TASKS[task].args
        for _, key, value in NEEDLE.findall(made(task, 2048, 1)[0]["input"]):
            assert re.fullmatch(forms[args["key"]], key)
            assert re.fullmatch(forms[args["value"]], value)


def test_the_noise_haystack_is_one_line_repeated() -> None:
    text = made("niah_single_1", 2048, 1)[0]["input"]
    lines = text[text.index("afterwards.\n") : text.rindex("\nWhat ")].split("\n")[1:]
    assert Counter(line == STRINGS["noise"] for line in lines)[False] == 1


def test_the_essay_is_whole_but_for_the_needles() -> None:
    row = made("niah_single_2", 4096, 1)[0]
    text = row["input"]
    context = text[text.index("afterwards.\n") + 12 : text.rindex("\nWhat ")]
    needle = NEEDLE.search(context)
    assert needle is not None
    essay = f"{context[: needle.start()]} {context[needle.end() :]}".split()
    assert essay == ALICE.read_text(encoding="utf-8").split()[: len(essay)]


def test_depths_are_upstreams_forty() -> None:
    assert np.round(np.linspace(0, 100, num=40)).astype(int).tolist() == DEPTHS


@pytest.mark.parametrize("task", NIAH)
def test_one_answer_puts_the_whole_template_into_the_singular(task: str) -> None:
    row = made(task, 2048, 1)[0]
    single = TASKS[task].args["queries"] * TASKS[task].args["values"] == 1
    kind = TASKS[task].args["value"]
    assert ("You is kind. A say so." in row["input"]) == single
    assert ("A special magic " in row["input"]) == single
    assert row["answer_prefix"].startswith(f" The special magic {kind[:-1] if single else kind} for ")
    assert row["answer_prefix"].endswith(" is" if single else " are")
    assert f"One of the special magic {kind} for" in row["input"]


def test_several_queries_are_joined_as_upstream_does() -> None:
    assert re.search(r" for (\S+( hoc-\S+)?, ){3}and \S+ ?\S* mentioned", made("niah_multiquery", 4096, 1)[0]["input"])


def test_multikey_3_draws_the_published_answers() -> None:
    # NVIDIA/RULER, results/mistral-7b-instruct-v0.2/synthetic/4096/pred/submission.csv: samples 0, 1, 2 and 42, 25
    # lines each, sized by the older steps, as a tokenizer of characters gives them too
    rows = made("niah_multikey_3", 4096, 43, sizing="step", count=len)
    assert [rows[i]["outputs"][0] for i in (0, 1, 2, 42)] == [
        "e256a6dc-8f54-46b7-87b5-b2bc5a8aaeca",
        "6a18ce4c-7496-4764-92a4-def0c4bbb7a9",
        "07f194f9-c115-4d6d-8a4e-5b70a6d964a3",
        "64b5d9a5-7d6c-4d2a-9564-d1d34e0fbae1",
    ]
    assert {len(NEEDLE.findall(row["input"])) for row in rows} == {26}


def test_the_chain_is_in_order_after_a_worked_example() -> None:
    rows = made("vt", 4096)
    examples = set()
    for row in rows:
        assert row["input"].startswith(f"{CHAT.head}Memorize and track")
        worked, question = row["input"].removeprefix(CHAT.head).split("\n\nMemorize and track")
        prompt, answer = worked.split(", they are:  ")
        examples.add(answer)
        assert pieces(worked) <= 500
        for text, size, names in ((prompt, 3, answer.split()), (question, 5, row["outputs"])):
            assert len(set(names)) == 5
            assert all(re.fullmatch(f"[A-Z]{{{size}}}", name) for name in names)
            value = re.findall(r"assigned the value (\d{5}) in the text above", text)[0]
            lines = [f"VAR {names[0]} = {value}"]
            lines += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
            assert [line for line in text.split("\n") if line.startswith("VAR")] == lines
        assert row["answer_prefix"].endswith(f", 5 variables are assigned the value {value}, they are: ")
    assert len(examples) == len(rows)


@pytest.mark.parametrize(
    ("length", "often", "seldom", "worked"), [(2048, 6, 1, (20, 3, 1)), (4096, 30, 3, (40, 10, 3))]
)
def test_ten_words_are_common(length: int, often: int, seldom: int, worked: tuple[int, int, int]) -> None:
    for row in made("cwe", length, 3):
        first, second = row["input"].split("Below is a numbered list")[1:]
        assert first.split(CHAT.tail)[1].startswith(" Answer: The top 10 words")
        assert first.split("list are:")[1].startswith(" 1. ")
        counts = Counter(_listed(second))
        assert sorted(counts[word] for word in row["outputs"]) == [often] * 10
        assert {count for word, count in counts.items() if word not in row["outputs"]} == {seldom}
        example, common = Counter(_listed(first.split("\nQuestion")[0])), _listed(first.split("list are:")[1])
        assert len(example) == worked[0]
        assert sorted(example.values()) == [worked[2]] * (worked[0] - 10) + [worked[1]] * 10
        assert {word for word, count in example.items() if count == worked[1]} == set(common)


def _listed(text: str) -> list[str]:
    return [word.strip() for word in re.findall(r"(?<=\d\. )([^.\d]+?)(?= \d+\. |\n|$)", text.split("\nQuestion")[0])]


def test_the_three_most_frequent_words_come_after_the_dots() -> None:
    for row in made("fwe", 4096):
        text = row["input"][row["input"].index("coded words. ") + 13 : row["input"].index("\nQuestion")]
        ranked = Counter(text.split()).most_common()
        assert ranked[0][0] == "..."
        assert {word for word, _ in ranked[1:4]} == set(row["outputs"])
        assert ranked[3][1] > ranked[4][1]
        for rank, (_, count) in enumerate(ranked[:4], 1):
            assert abs(count - ranked[0][1] / rank**2) <= 1


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_documents_hold_the_gold_ones_and_are_numbered(task: str) -> None:
    rows = made(task, 4096)
    for index, row in enumerate(rows):
        numbers = [int(number) for number in re.findall(r"Document (\d+):\n", row["input"])]
        assert numbers == list(range(1, len(numbers) + 1))
        gold = [f"{index // 4}-{index % 4} fact 3"] if task == "qa_1" else [f"{index}-{d} fact 3" for d in range(10)]
        assert all(text in row["input"] for text in gold)
    if task == "qa_1":  # the article's other paragraphs come before random ones
        assert all(f"0-{p} fact 1 " in rows[0]["input"] for p in range(4))


def test_fewer_questions_than_samples_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(made("qa_2", 4096, samples=40)) == 30
    assert "qa_2: 40 samples asked for, the file has 30 questions" in capsys.readouterr().err


@pytest.mark.parametrize("length", [4096, 16384])
@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_questions_of_the_real_files(task: str, length: int) -> None:
    if not SHARED.is_dir():
        pytest.skip("../shared/data/ruler is not there")
    rows = made(task, length, 5, sources=Sources(qa_path=SHARED))
    assert all(0.5 * length < row["length"] <= length for row in rows)
    assert all(answer in row["input"] for row in rows for answer in row["outputs"] if answer not in ("yes", "no"))


@pytest.mark.parametrize("task", TASKS)
def test_a_length_below_the_minimum_names_it(task: str) -> None:
    with pytest.raises(ValueError, match=rf"context_len: got 150, allowed for {task} .*: at least about \d{{3,4}}"):
        made(task, 150)


def test_the_stated_minimum_is_enough() -> None:
    with pytest.raises(ValueError, match="at least") as error:
        made("niah_single_1", 100)
    made("niah_single_1", int(str(error.value).split()[-1]) + 10)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_3", "vt", "cwe"])
def test_steps_give_whole_steps(task: str) -> None:
    rows = made(task, 4096, 3, sizing="step")
    assert all(row["length"] <= 4096 for row in rows)
    lines = {"niah_single_1": STRINGS["noise"], "niah_multikey_3": "One of the", "vt": STRINGS["noise"]}
    if task in lines:
        text = rows[0]["input"].split("Memorize and track")[-1]
        units = text.count(lines[task]) - (task == "niah_multikey_3")
        assert units % (10 if task == "vt" else 25) == 0


def test_special_tokens_that_will_be_added_have_room() -> None:
    assert all(row["length"] <= 2048 for row in made("niah_single_1", 2048, special_tokens=3))
    assert all(
        pieces(row["input"] + row["answer_prefix"]) + 128 + 3 == row["length"]
        for row in made("niah_single_1", 2048, special_tokens=3)
    )


@pytest.mark.parametrize("task", ["niah_multikey_1", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_the_real_tokenizer_counts_the_same(task: str) -> None:
    try:
        tokenizer = load_tokenizer("SmolLM2-135M-Instruct")
    except RuntimeError as error:
        pytest.skip(str(error))
    rows = made(task, 4096, 4, count=token_counter(tokenizer), chat=chat_template("auto", tokenizer))
    for row in rows:
        prompt = row["input"] + row["answer_prefix"]
        assert len(tokenizer(prompt).input_ids) + TASKS[task].new_tokens == row["length"] <= 4096
    assert max(row["length"] for row in rows) > 0.9 * 4096
