"""Needle prompts fit their length, hold the needle once at its depth, and end where the answer begins."""

from typing import Any

import pytest

from benchmark.needle import needle_prompt
from benchmark.needles import questions, resume
from benchmark.results import write_json


class Words:
    """Tokenizer of one token a word."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"input_ids": text.split()})


@pytest.mark.parametrize("haystack", ["text", "noise"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_prompt_fits_and_holds_the_needle_at_its_depth(haystack: str, depth: float) -> None:
    prompt = needle_prompt(Words(), 2000, depth, haystack, seed=1)
    words = prompt.text.split()
    assert 1950 < len(words) <= 2000
    assert prompt.text.count(prompt.answer) == 1
    place = next(i for i, word in enumerate(words) if prompt.answer in word)
    assert abs(place / len(words) - depth) < 0.06
    assert prompt.text.endswith("mentioned in the provided text is")


def test_prompts_repeat_for_a_seed_and_differ_between_seeds() -> None:
    one, again, other = (needle_prompt(Words(), 500, 0.5, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one.answer != other.answer


@pytest.mark.parametrize(
    ("tokens", "depth", "haystack", "message"),
    [
        (500, 0.5, "essay", "haystack: got 'essay', allowed: text, noise"),
        (500, 1.5, "text", "depth: got 1.5, allowed: 0 to 1"),
        (20, 0.5, "text", "context_len: got room for 20 tokens"),
    ],
)
def test_bad_prompts_are_refused(tokens: int, depth: float, haystack: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needle_prompt(Words(), tokens, depth, haystack)


def test_questions_spread_over_haystacks_and_depths() -> None:
    asked = questions(20)
    assert len(set(asked)) == 20
    assert {haystack: sum(q[0] == haystack for q in asked) for haystack in ("text", "noise")} == {
        "text": 10,
        "noise": 10,
    }
    assert min(q[1] for q in asked) == 0
    assert max(q[1] for q in asked) == 1


def test_a_run_goes_on_only_with_the_same_settings(tmp_path: Any) -> None:
    path = tmp_path / "out.json"
    assert resume(path, {"top_k": 5}) == {}
    write_json(path, {"config": {"top_k": 5}, "questions": {"text/0.000": {"results": {}}}})
    assert resume(path, {"top_k": 5}) == {"text/0.000": {"results": {}}}
    with pytest.raises(ValueError, match="holds results of other settings"):
        resume(path, {"top_k": 6})
