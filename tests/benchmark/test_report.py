"""The report: intervals by hand, tables as text, what may not be compared, and files that need nothing else."""

import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark.report.__main__ import main, make_report
from benchmark.report.blocks import Cell, Table, to_html, to_markdown
from benchmark.report.bootstrap import RESAMPLES, interval, resampled_means
from benchmark.report.estimates import Estimates, Weights, averages
from benchmark.report.groups import Group, group_folders
from benchmark.report.load import read_folder
from benchmark.report.tables import costs, made_with, mean_costs, overview, tasks_at

FULL, FLAT = [100.0, 100.0, 50.0, 0.0], [100.0, 50.0, 0.0, 0.0]
SCORES = {"full": {"one": FULL, "two": [80.0] * 4}, "flat": {"one": FLAT, "two": [70.0] * 4}}
COSTS = {"attended_share": 0.05, "scored_share": 1.0, "index_bytes": 2**20, "kv_bytes": 2**22}

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is in the benchmark extra"
)


def write_folder(folder: Path, scores: Mapping[str, Mapping[str, Sequence[float]]] = SCORES, **protocol: Any) -> Path:
    """A results folder as benchmark.runner leaves it, without records."""
    results = {
        strategy: {
            task: {"score": sum(each) / len(each), "samples": len(each), "scores": each, **COSTS}
            for task, each in by_task.items()
        }
        for strategy, by_task in scores.items()
    }
    config = {"benchmark": "RULER", "model": "tiny", "length": 4096, "seed": 42, "RetroInfer": {"core": 2}, **protocol}
    environment = {"commit": "0123abc", "packages": {"torch": "2.13.0"}, "cpu": "a CPU", "gpu": None}
    folder.mkdir(parents=True)
    content = {"config": config, "environment": environment, "results": results}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def write_records(folder: Path, strategy: str, task: str, ids: Sequence[str]) -> None:
    (folder / strategy).mkdir(exist_ok=True)
    lines = [json.dumps({"id": name, "pred": "", "expected": ["7"]}) + "\n" for name in ids]
    (folder / strategy / f"{task}.jsonl").write_text("".join(lines))


def group_of(*folders: Path, allow_mixed: bool = False) -> Group:
    (group,) = group_folders([read_folder(folder) for folder in folders], allow_mixed)
    return group


def text_of(table: Table | None) -> list[list[str]]:
    """Rows of a table's Markdown, without its header's underline."""
    assert table is not None
    lines = [line.strip("| ").split(" | ") for line in to_markdown([table]).splitlines()]
    return [[cell.strip() for cell in line] for line in (lines[0], *lines[2:])]


def test_equal_scores_have_an_interval_of_width_zero() -> None:
    draws = resampled_means(np.full((7, 1), 100 / 3), "any")
    assert draws.shape == (RESAMPLES, 1)
    assert interval(100 / 3, draws[:, 0]) == (33.333333333,) * 3


def test_a_constant_drop_is_certain_although_the_scores_vary(tmp_path: Path) -> None:
    varied = [10.1, 90.7, 33.3, 55.5]
    scores = {"full": {"one": varied}, "flat": {"one": [score - 7.5 for score in varied]}}
    estimates = Estimates(group_of(write_folder(tmp_path / "a", scores)))
    where: Weights = {(4096, "one"): 1.0}
    assert estimates.drop("flat", where) == (7.5, 7.5, 7.5)
    score = estimates.score("flat", where)
    assert score.low < score.value - 5
    assert score.high > score.value + 5


def test_interval_of_two_samples_is_that_of_the_binomial() -> None:
    """The mean of two draws from {0, 100} is 0, 50 or 100 with probabilities 1/4, 1/2, 1/4."""
    draws = resampled_means(np.array([[0.0], [100.0]]), "coin")[:, 0]
    shares = [np.mean(draws == mean) for mean in (0, 50, 100)]
    assert np.allclose(shares, [0.25, 0.5, 0.25], atol=0.02)
    assert interval(50, draws) == (50, 0, 100)


def test_interval_matches_the_normal_one_for_many_samples() -> None:
    scores = np.random.default_rng(0).normal(50, 10, size=(400, 1))
    found = interval(scores.mean(), resampled_means(scores, "normal")[:, 0])
    half = 1.96 * scores.std() / 20
    assert found.low == pytest.approx(scores.mean() - half, abs=0.1)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.1)


def test_draws_depend_on_the_name_alone() -> None:
    scores = np.arange(5.0)[:, None]
    assert np.array_equal(resampled_means(scores, "a"), resampled_means(scores, "a"))
    assert not np.array_equal(resampled_means(scores, "a"), resampled_means(scores, "b"))


def test_tasks_are_resampled_by_themselves_for_their_mean(tmp_path: Path) -> None:
    """Two independent tasks of a coin each: the mean's variance is half of one task's."""
    coin = [0.0, 100.0] * 50
    estimates = Estimates(group_of(write_folder(tmp_path / "a", {"full": {"one": coin, "two": coin}})))
    one = estimates.score("full", {(4096, "one"): 1.0})
    both = estimates.score("full", {(4096, "one"): 0.5, (4096, "two"): 0.5})
    assert (both.high - both.low) / (one.high - one.low) == pytest.approx(0.5**0.5, abs=0.08)


def test_table_of_tasks(tmp_path: Path) -> None:
    estimates = Estimates(group_of(write_folder(tmp_path / "a")))
    header, one, two, mean = text_of(tasks_at(estimates, 4096))
    assert header == ["task", "samples", "full", "flat"]
    assert one[:2] == ["one", "4"]
    assert re.fullmatch(r"62\.5 \[[\d.]+, 100\.0\]", one[2])
    assert one[3] == "37.5 (drop 25.0 [0.0, 50.0])"
    assert two == ["two", "4", "80.0 [80.0, 80.0]", "70.0 (**drop 10.0 [10.0, 10.0]**)"]
    assert mean[0] == "**mean of 2 tasks**"
    assert mean[3] == "53.8 (**drop 17.5 [5.0, 30.0]**)"


def test_overview_and_costs_over_two_lengths(tmp_path: Path) -> None:
    better = {"full": SCORES["full"], "flat": {"one": FULL, "two": [81.0] * 4}}
    folders = (write_folder(tmp_path / "b", better, length=8192), write_folder(tmp_path / "a"))
    group = group_of(*folders)
    header, full, flat = text_of(overview(Estimates(group)))
    assert header == ["strategy", "4K", "8K", "mean of the lengths", "largest drop of a task"]
    assert full[-1] == "\N{EN DASH}"
    minus = "\N{MINUS SIGN}"
    assert flat[2] == f"71.8 (**drop {minus}0.5 [{minus}0.5, {minus}0.5]**)"
    assert flat[3].startswith("62.8 (**drop 8.5 [")
    assert flat[4] == "25.0 [0.0, 50.0] (one at 4K)"
    rows = text_of(costs(group))
    titles = ["tokens attended", "keys scored", "index", "KV cache", "index / KV cache", "KV read a step"]
    assert rows[0] == ["strategy", "context", *titles]
    assert rows[3] == ["flat", "4K", "5.00 %", "100 %", "1.0 MiB", "4.0 MiB", "25.0 %", "0.2 MiB"]


def test_clusters_count_among_the_bytes_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, "estimated_share", 0.07)
    group = group_of(write_folder(tmp_path / "a"))
    assert mean_costs(group, "flat", 4096)["read_bytes"] == pytest.approx(0.12 * 2**22)
    rows = text_of(costs(group))
    assert rows[0][3] == "clusters read"
    assert (rows[1][3], rows[1][-1]) == ("7.00 %", "0.5 MiB")


def test_without_full_attention_there_are_scores_alone(tmp_path: Path) -> None:
    estimates = Estimates(group_of(write_folder(tmp_path / "a", {"flat": SCORES["flat"]})))
    assert text_of(overview(estimates)) == [["strategy", "4K"], ["flat", text_of(overview(estimates))[1][1]]]
    assert not re.search("drop", to_markdown([tasks_at(estimates, 4096)]))


def test_an_unfinished_task_is_told_in_the_mean(tmp_path: Path) -> None:
    scores = {"full": SCORES["full"], "flat": {"two": [70.0] * 4}}
    estimates = Estimates(group_of(write_folder(tmp_path / "a", scores)))
    assert text_of(tasks_at(estimates, 4096))[1][3] == "\N{EN DASH}"
    assert text_of(overview(estimates))[2][1] == "70.0 of 1 tasks (**drop 10.0 [10.0, 10.0]**)"


def test_means_of_longbench() -> None:
    found = averages("LongBench", ["narrativeqa", "qasper", "vcsum", "lcc"])
    assert found["categories"].label == "mean of 3 of 6 category means (4 of 21 datasets)"
    assert found["categories"].weights == pytest.approx(
        {"narrativeqa": 1 / 6, "qasper": 1 / 6, "vcsum": 1 / 3, "lcc": 1 / 3}
    )
    assert found["english"].label == "mean of 3 of 16 English and code datasets"
    assert found["english"].weights == pytest.approx({"narrativeqa": 1 / 3, "qasper": 1 / 3, "lcc": 1 / 3})


def test_settings_are_told_once_or_side_by_side(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / str(length), length=length) for length in (4096, 8192)]
    differing, shared = made_with([read_folder(folder) for folder in folders])
    assert text_of(differing)[1:] == [["length", "4096", "8192"]]
    told = text_of(shared)
    assert ["seed", "42"] in told
    assert ["environment.packages.torch", "2.13.0"] in told
    assert ["environment.gpu", "none"] in told
    assert ["RetroInfer.core", "2"] in told


def test_mixed_protocols_are_refused_and_named(tmp_path: Path) -> None:
    folders = write_folder(tmp_path / "a"), write_folder(tmp_path / "b", length=8192, seed=43)
    with pytest.raises(ValueError, match=r"protocols differ \(seed: 42 in .*a, 43 in .*b\); --allow_mixed"):
        group_of(*folders)
    assert group_of(*folders, allow_mixed=True).mixed == ["seed"]


def test_settings_that_follow_the_length_may_differ(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "a", RetroInfer={"core": 2, "n_centroids": 256})
    longer = write_folder(tmp_path / "b", length=8192, RetroInfer={"core": 9, "n_centroids": 512})
    assert group_of(first, longer).mixed == []
    other = write_folder(tmp_path / "c", {"ivf": SCORES["flat"]}, RetroInfer={"core": 2, "n_centroids": 300})
    with pytest.raises(ValueError, match=r"RetroInfer\.n_centroids: 256 in .*, 300 in"):
        group_of(first, other)


def test_a_strategy_run_in_two_ways_has_two_rows(tmp_path: Path) -> None:
    other = {"full": SCORES["full"], "flat": {"one": [0.0] * 4, "two": [70.0] * 4}}
    folders = write_folder(tmp_path / "a", top_k=100), write_folder(tmp_path / "b", other, top_k=32)
    group = group_of(*folders, allow_mixed=True)
    assert group.rows == ["full", "flat A", "flat B"]
    assert group.variants == {"A": "top_k: 100", "B": "top_k: 32"}
    assert Estimates(group).drop("flat B", {(4096, "one"): 1.0}) == (62.5, 25.0, 100.0)
    same_settings = write_folder(tmp_path / "c", other, top_k=100)
    with pytest.raises(ValueError, match=r"c/results\.json and .*a/results\.json: different results of strategy flat"):
        group_of(folders[0], same_settings, allow_mixed=True)


def test_different_samples_are_refused(tmp_path: Path) -> None:
    counts = write_folder(tmp_path / "a", {"full": {"one": FULL}, "flat": {"one": FLAT[:3]}})
    with pytest.raises(ValueError, match=r"results\.json: task one: flat and full .*\(3 samples against 4\)"):
        read_folder(counts)
    names = write_folder(tmp_path / "b")
    write_records(names, "full", "one", "abcd")
    write_records(names, "flat", "one", "abxd")
    with pytest.raises(ValueError, match=r"task one: flat and full .*\(sample 3 is 'x' \['7'\] against 'c' \['7'\]\)"):
        read_folder(names)
    apart = [write_folder(tmp_path / s, {s: {"one": SCORES[s]["one"][: 4 - i]}}) for i, s in enumerate(SCORES)]
    with pytest.raises(ValueError, match="RULER, task one at 4096 tokens: flat and full have different samples"):
        group_of(*apart)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-9], "damaged JSON"),
        (lambda text: text.replace("100.0", "100.5", 1), r"strategy full, task one: scores: got \[100\.5, 100\.0"),
        (lambda text: text.replace('"samples": 4', '"samples": 5', 1), "task one: samples: got 5 beside 4 scores"),
        (lambda text: text.replace('"model"', '"name"', 1), "config.model: got None, allowed: a name"),
        (lambda text: text.replace("4096", '"long"'), "config.length: got 'long', allowed: the context length"),
        (lambda text: text.replace('"kv_bytes": 4194304', '"kv_bytes": -1', 1), "kv_bytes: got -1, allowed"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    file = write_folder(tmp_path / "a") / "results.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=rf"results\.json: .*{message}"):
        read_folder(tmp_path / "a")


def test_a_missing_file_or_package_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmark.report.__main__.find_spec", lambda name: None)
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert 'python -m pip install -e ".[benchmark]"' in capsys.readouterr().err
    monkeypatch.setattr("benchmark.report.__main__.find_spec", lambda name: name)
    if importlib.util.find_spec("matplotlib"):
        assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
        assert f"{tmp_path}: no results.json in it" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@needs_matplotlib
def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / str(length), length=length, note="<|x|>") for length in (4096, 8192)]
    files = make_report(folders, tmp_path / "out")
    assert sorted(path.name for path in files) == sorted(os.listdir(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,|#part-)[^"]*"', page) == []
    assert not re.search(r"https?://|url\(|@import", page)
    assert set(re.findall(r'href="#([^"]*)"', page)) == set(re.findall(r' id="([^"]*)"', page))
    assert "&lt;|x|&gt;" in page
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    plots = re.findall(r"!\[.*\]\((.*)\)", markdown)
    assert len(plots) == 3
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    assert "drop 25.0 [0.0, 50.0]" in markdown
    before = {path: path.read_bytes() for path in files}
    make_report(folders, tmp_path / "out")
    assert {path: path.read_bytes() for path in files} == before


@needs_matplotlib
def test_a_full_disk_keeps_the_older_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "a", {"flat": {"one": FLAT}}, benchmark="other", length=None)
    files = make_report([folder], tmp_path / "out")
    before = {path: path.read_bytes() for path in files}
    assert b"Full attention was not run" in before[files[0]]

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    (folder / "results.json").write_text((folder / "results.json").read_text().replace("50.0", "60.0"))
    with pytest.raises(OSError, match="No space left"):
        make_report([folder], tmp_path / "out")
    assert files[0].read_bytes() == before[files[0]]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(path.name for path in files)


def test_text_is_escaped_in_both_formats() -> None:
    table = Table(["a|b"], [[Cell("<i> & *x*")]])
    assert to_markdown([table]) == "| a\\|b |\n| --- |\n| \\<i> & \\*x\\* |\n"
    assert "&lt;i&gt; &amp; *x*" in to_html([table], "<t>")
    assert "<title>&lt;t&gt;</title>" in to_html([table], "<t>")
