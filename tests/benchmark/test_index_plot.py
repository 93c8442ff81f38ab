"""Means over traces, the table, the plots' points, and what the plots refuse."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from index_cases import write_trace

from benchmark.index import __main__ as command
from benchmark.index import plot, recall_table
from benchmark.index.averages import group_rows
from config import RetroInferConfig

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is in the benchmark extra"
)
GRAPH = "attention_aware_graph"


def row(name: str, trace: str, error: float, worst: float, strategy: str = "flat", **more: Any) -> dict[str, Any]:
    recall = more.pop("recall", None)
    return {
        "name": name,
        "strategy": strategy,
        "set": more.pop("set", {}),
        "trace": {"folder": trace, "model": "tiny", "prompt": {"context_len": more.pop("context_len", 8192)}},
        "settings": {GRAPH: {"top_k": 100, "estimation": more.pop("estimation", "none")}, "ivf": {"top_k": 50}},
        "tokens": 8000,
        "output_error": {"median": error, "mean": error, "p90": error, "worst_head": worst},
        "recall": recall and {"mean": recall, "worst_head": recall / 2},
        "bytes_read": 2048.0,
        "keys_scored": 50.0,
        **more,
    }


def test_traces_of_a_length_are_averaged() -> None:
    rows = [
        row("flat 100", "vt", 0.1, 0.5, recall=0.8),
        row("flat 100", "fwe", 0.3, 0.4, recall=0.6),
        row("flat 200", "vt", 0.05, 0.2),
        row("ivf", "vt", 0.1, 0.2, strategy="ivf"),
        row("graph", "vt", 0.1, 0.2, strategy=GRAPH, set={f"{GRAPH}.top_k": 100}, estimation="centroid"),
        row("flat 100", "vt long", 0.7, 0.9, context_len=32768),
    ]
    short, long = group_rows(rows)
    assert (short.context_len, long.context_len, short.traces) == (8192, 32768, ["vt", "fwe"])
    first = short.averages[0]
    assert first.traces == 2
    assert first.values["error_median"] == pytest.approx(0.2)
    assert first.values["error_worst"] == 0.5
    assert first.values["recall"] == pytest.approx(0.7)
    assert first.values["recall_worst"] == 0.3
    assert "recall" not in short.averages[1].values
    assert [average.series for average in short.averages] == ["flat", "flat", "ivf", f"{GRAPH} + centroid"]
    assert [average.top_k for average in short.averages] == [100, 100, 50, 100]
    assert [how.label for how in short.drawn()] == ["100", "200", "ivf", "graph"]
    lines = plot.to_markdown([plot.table(short)]).splitlines()
    assert lines[0].startswith("|  | traces | error: median | mean | p90 | worst head | recall |")
    assert lines[2].startswith("| flat 100 | 2 | 0.200 | 0.200 | 0.200 | 0.500 | 0.700 |")
    assert lines[3].startswith("| flat 200 | 1 | 0.050 | 0.050 | 0.050 | 0.200 | \N{EN DASH} |")


def test_a_series_is_named_after_the_estimation_in_force() -> None:
    rows = [
        row("by default", "vt", 0.1, 0.2, estimation=RetroInferConfig().attention_aware_graph.estimation),
        row("stated", "vt", 0.1, 0.2, set={f"{GRAPH}.estimation": "none"}),
        row("wave", "vt", 0.1, 0.2, strategy="wave_index", estimation="centroid"),
    ]
    (group,) = group_rows(rows)
    assert [average.series for average in group.averages] == ["flat + centroid", "flat", "wave_index"]


def test_names_that_differ_in_numbers_alone_are_one_line() -> None:
    names = [
        "graph, ef 100",
        "graph, ef 115.5",
        "graph, int8, ef 100",
        "int4 by 16 links, ef 64",
        "int4 by 16 links, ef 80",
    ]
    rows = [row(name, "vt", 0.1, 0.2, strategy=GRAPH) for name in names]
    rows += [row(f"IVF, {lists} lists of 64", "vt", 0.1, 0.2, strategy="ivf") for lists in (37, 110)]
    rows += [
        row(name, "vt", 0.1, 0.2, set={"estimation": 1}, estimation="centroid")
        for name in ("exact 100", "exact 100, again")
    ]
    rows += [row(name, "vt", 0.1, 0.2) for name in ("exact 100", "exact")]
    (group,) = group_rows(rows)
    assert [(how.series, how.label) for how in group.drawn()] == [
        ("graph, ef \N{HORIZONTAL ELLIPSIS}", "100"),
        ("graph, ef \N{HORIZONTAL ELLIPSIS}", "115.5"),
        ("graph, int8, ef 100", ""),
        ("int4 by 16 links, ef \N{HORIZONTAL ELLIPSIS}", "64"),
        ("int4 by 16 links, ef \N{HORIZONTAL ELLIPSIS}", "80"),
        ("ivf", "37"),
        ("ivf", "110"),
        ("exact 100 (flat + centroid)", ""),
        ("exact 100, again", ""),
        ("exact 100 (flat)", ""),
        ("exact", ""),
    ]


def test_the_table_of_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row("exact", "vt", 0.1, 0.2, recall=1.0),
        row("graph", "vt", 0.1, 0.2, recall=0.9, mass_of_exact={"mean": 0.99, "worst_head": 0.8}),
        row("graph", "fwe", 0.3, 0.2, recall=0.7, mass_of_exact={"mean": 0.97, "worst_head": 0.9}),
        row("full", "vt", 0.0, 0.0),
    ]
    results = tmp_path / "o.json"
    results.write_text(json.dumps({"protocol": {}, "rows": rows}))
    assert recall_table.main([str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny, 8K tokens, vt, fwe:"
    assert lines[-2].startswith("| exact | 1.000 | 0.500 | \N{EN DASH} | \N{EN DASH} | 0.1000 | 50 | 0.62 % |")
    assert lines[-1] == "| graph | 0.800 | 0.350 | 0.980 | 0.800 | 0.2000 | 50 | 0.62 % |"
    assert recall_table.main([str(results), "--only", "exact"]) == 0
    assert "| graph" not in capsys.readouterr().out
    assert recall_table.main([str(results), "--only", "full"]) == 2
    assert "no row with a recall and 'full' in its name" in capsys.readouterr().err


@needs_matplotlib
def test_from_traces_to_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, results, output = write_trace(tmp_path / "a", layers=(0,)), tmp_path / "o.json", tmp_path / "plots"
    sweep = [{"name": "full", "strategy": "full"}]
    sweep += [
        {"name": f"flat {k}", "strategy": "flat", "set": {f"{GRAPH}.top_k": k}}
        for k in (20, 40)  # type: ignore[dict-item]
    ]
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    words = ["--traces", str(folder), "--sweep", str(tmp_path / "sweep.json"), "--output", str(results)]
    assert command.main(words) == 0
    assert plot.main([str(results), "--output", str(output)]) == 0
    document = (output / "index.md").read_text()
    assert capsys.readouterr().out == document
    assert "## tiny, 512" in document
    assert "| flat 40 |" in document
    for image in ("error_tiny_512.png", "recall_tiny_512.png", "mass_tiny_512.png"):
        assert f"]({image})" in document
        assert (output / image).read_bytes().startswith(b"\x89PNG")
    assert len(list(output.iterdir())) == 4


@needs_matplotlib
def test_lines_join_the_points_that_none_beats() -> None:
    from benchmark.report.plots import Point, _fronts

    places = [(1.0, 5.0), (2.0, 6.0), (3.0, 4.0), (3.0, 3.0), (4.0, 3.5)]
    points = [Point((x, None), y, "", "a") for x, y in places]
    assert _fronts(points, 0, "lower") == [("a", [(1.0, 5.0), (3.0, 3.0)])]
    assert _fronts(points, 0, "higher") == [("a", [(1.0, 5.0), (2.0, 6.0)])]
    assert _fronts(points, 1, "lower") == []
    assert _fronts([*points, Point((1.0, None), 9.0, "", "a", "b")], 0, "lower")[1] == ("a", [(1.0, 9.0)])


@needs_matplotlib
@pytest.mark.parametrize(
    ("content", "told"),
    [("{}", "not a results file"), ('{"protocol": {}, "rows": []}', "got no rows"), ("[", "not JSON")],
)
def test_bad_results_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, told: str) -> None:
    (tmp_path / "o.json").write_text(content)
    assert plot.main([str(tmp_path / "o.json"), "--output", str(tmp_path / "plots")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()
    assert plot.main([str(tmp_path / "none.json"), "--output", str(tmp_path / "plots")]) == 2
