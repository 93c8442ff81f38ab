"""LongBench's data: names, files, schema, and what a wrong one is answered with."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
from longbench_samples import SAMPLES, make_record, write_records

from benchmark.LongBench import records as records_module
from benchmark.LongBench.catalog import (
    CATEGORIES,
    DATASETS,
    E_DATASETS,
    ENGLISH_AND_CODE,
    MAX_NEW_TOKENS,
    METRIC,
    NO_CHAT_TEMPLATE,
    PROMPTS,
    choose_datasets,
)
from benchmark.LongBench.records import read_dataset


def test_the_benchmark_is_complete() -> None:
    assert len(DATASETS) == 21
    assert set(PROMPTS) == set(MAX_NEW_TOKENS) == set(DATASETS)
    assert sorted(name for names in CATEGORIES.values() for name in names) == sorted(DATASETS)
    assert [len(names) for names in CATEGORIES.values()] == [4, 4, 4, 4, 3, 2]
    assert (len(E_DATASETS), len(ENGLISH_AND_CODE), len(NO_CHAT_TEMPLATE)) == (13, 16, 6)
    assert not [name for name in ENGLISH_AND_CODE if METRIC[name].endswith("_zh") or name == "lsht"]


def test_the_prompts_keep_the_originals_errors() -> None:
    assert "asconcisely" in PROMPTS["narrativeqa"]
    assert PROMPTS["lcc"] == "Please complete the code given below. \n{context}Next line of code:\n"
    assert PROMPTS["passage_count"].endswith("The final answer is: ")


def test_the_constants_are_the_originals() -> None:
    if not SAMPLES.is_dir():
        pytest.skip("no ../shared/data/longbench beside the repository")
    own = Path(records_module.__file__).parent / "data"
    for name in ("prompts.json", "maxlen.json"):
        assert (own / name).read_bytes() == (SAMPLES.parent / name).read_bytes()


def test_datasets_are_chosen_by_name_and_category() -> None:
    assert choose_datasets() == list(DATASETS)
    assert choose_datasets(extended=True) == [name for name in DATASETS if name in E_DATASETS]
    assert choose_datasets(["trec", "qasper"]) == ["qasper", "trec"]
    assert choose_datasets(["trec"], ["CC"]) == ["trec", "lcc", "repobench-p"]
    assert choose_datasets(categories=["SQA"], extended=True) == ["qasper", "multifieldqa_en"]
    with pytest.raises(ValueError, match=r"datasets: got squad; LongBench has narrativeqa, qasper, .*repobench-p"):
        choose_datasets(["trec", "squad"])
    with pytest.raises(ValueError, match="datasets: got musique; LongBench-E has qasper"):
        choose_datasets(["musique"], extended=True)
    with pytest.raises(ValueError, match="category: got 'QA', allowed: SQA, MQA, SUM, FSL, ST, CC"):
        choose_datasets(categories=["QA"])


def test_a_folder_a_folder_with_data_and_a_zip_give_the_same(tmp_path: Path) -> None:
    records = [make_record("trec", n) for n in range(3)]
    records[1]["context"] = "a\u2028b\x85c"  # line ends to some, not to JSON lines
    file = write_records(tmp_path / "data" / "trec.jsonl", records)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(file, "data/trec.jsonl")
    for place in (tmp_path, tmp_path / "data", tmp_path / "data.zip"):
        assert read_dataset(place, "trec") == (records, [])


def test_the_hub_is_asked_where_no_path_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    write_records(tmp_path / "lcc_e.jsonl", [make_record("lcc")])
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(tmp_path / "lcc_e.jsonl", "data/lcc_e.jsonl")
    asked = []

    def download(*names: str, **options: str) -> str:
        asked.append((*names, options["repo_type"]))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert len(read_dataset(None, "lcc", extended=True)[0]) == 1
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]

    def offline(*names: str, **options: str) -> str:
        raise OSError("no route")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched \(OSError: no route\); give data_path: a folder"):
        read_dataset(None, "lcc")


def test_missing_data_say_where_to_get_them(tmp_path: Path) -> None:
    expected = r"expected a folder .* of <dataset>\.jsonl.*data\.zip of the hub's dataset THUDM/LongBench"
    with pytest.raises(FileNotFoundError, match=rf"nowhere does not exist; {expected}"):
        read_dataset(tmp_path / "nowhere", "trec")
    with pytest.raises(FileNotFoundError, match=rf"has no trec_e\.jsonl; {expected}"):
        read_dataset(tmp_path, "trec", extended=True)
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="neither a folder nor a zip file"):
        read_dataset(tmp_path / "file", "trec")
    (tmp_path / "trec.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no record in it"):
        read_dataset(tmp_path, "trec")


def test_a_malformed_line_is_named_and_left_out_only_when_asked(tmp_path: Path) -> None:
    good = [make_record("qasper", n) for n in range(3)]
    path = write_records(tmp_path / "qasper.jsonl", good)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + lines[1] + b'"\xff"\n' + lines[0] + lines[2])
    with pytest.raises(ValueError, match=r"qasper\.jsonl, line 2: not JSON: .* \(--skip_bad leaves such lines out\)"):
        read_dataset(tmp_path, "qasper")
    records, skipped = read_dataset(tmp_path, "qasper", skip_bad=True)
    assert records == good
    assert [line.number for line in skipped] == [2, 4, 5]
    assert "not UTF-8" in skipped[1].problem
    assert skipped[2].problem == "_id: got 'qasper-0' a second time, allowed: once"


@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        ("qasper", {"input": None}, "input: got None, allowed: a text"),
        ("qasper", {"length": "12"}, "length: got '12', allowed: an integer >= 0"),
        ("qasper", {"length": True}, "length: got True"),
        ("qasper", {"answers": []}, r"answers: got \[\], allowed: a list of texts, at least one"),
        ("qasper", {"answers": "cat"}, "answers: got 'cat'"),
        ("qasper", {"dataset": "trec"}, "dataset: got 'trec', allowed: 'qasper'"),
        ("trec", {"all_classes": None}, "all_classes: got None, allowed: a list of texts, at least one"),
        ("passage_retrieval_en", {"answers": ["3"]}, r"answers: got \['3'\], allowed: texts that match 'Paragraph"),
    ],
)
def test_records_are_checked(tmp_path: Path, dataset: str, changes: dict[str, Any], message: str) -> None:
    write_records(tmp_path / f"{dataset}.jsonl", [make_record(dataset, **changes)])
    with pytest.raises(ValueError, match=rf"line 1: {message}"):
        read_dataset(tmp_path, dataset)


def test_a_missing_key_and_a_line_that_is_no_object(tmp_path: Path) -> None:
    record = make_record("lcc")
    del record["_id"]
    write_records(tmp_path / "lcc.jsonl", [record])
    with pytest.raises(ValueError, match="_id: missing, allowed: a text"):
        read_dataset(tmp_path, "lcc")
    (tmp_path / "lcc.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1: got \[1\], allowed: a JSON object"):
        read_dataset(tmp_path, "lcc")


def test_records_of_the_e_variant_may_name_it(tmp_path: Path) -> None:
    write_records(tmp_path / "lcc_e.jsonl", [make_record("lcc", dataset="lcc_e")])
    assert read_dataset(tmp_path, "lcc", extended=True)[0][0]["dataset"] == "lcc_e"
