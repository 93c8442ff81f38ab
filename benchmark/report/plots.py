"""Plots as PNG: task x length heatmaps, and score against what it cost."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from .text import number

_PIXELS_PER_INCH = 200
_WIDEST = 13.0  # inches of panels side by side
_SCORES = LinearSegmentedColormap.from_list("score", ["#ffffff", "#dcebf7", "#a5cde9", "#6baed6"])
# Losses end darker than gains, so that a grey copy tells them apart.
_DROPS = LinearSegmentedColormap.from_list(
    "drop", [(0, "#8fc3e8"), (0.5, "#ffffff"), (0.75, "#f0a35e"), (1, "#8c2d04")]
)
# the same for all strategies and reports, so that a colour always means the same
DROP_COLOURS_END = 20
_COLOURS = (
    *("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#7f7f7f", "#882255", "#332288", "#117733", "#a6761d"),
)
_MARKERS = "osD^vPX<>hpd"
_DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
_MISSING = "#d9d9d9"
_LEGEND_WIDTH = 46  # characters, of which two columns fit below a panel


@dataclass(frozen=True)
class Panel:
    """Numbers [rows, columns], NaN where there are none. drops: points, colours centred at 0; else scores, 0 to 100."""

    title: str
    columns: Sequence[str]
    values: NDArray[np.float64]
    drops: bool


@dataclass(frozen=True)
class Point:
    """x by panel, y, what stands beside the marker, whose marker it is, and to which of its lines it belongs."""

    x: tuple[float | None, ...]
    y: float
    label: str
    series: str
    line: str = ""


def heatmap(title: str, rows: Sequence[str], panels: Sequence[Panel], sum_rows: int) -> bytes:
    """Panels with a number in every cell, side by side or, where they are wide, one below the other; the last
    `sum_rows` rows are set off from the others."""
    broken = [[re.sub(r"([_ ])", r"\1\n", name) for name in panel.columns] for panel in panels]
    cell = max(0.72, 0.08 * max(len(line) for names in broken for name in names for line in name.split("\n")) + 0.1)
    head = 0.15 * max(name.count("\n") + 1 for names in broken for name in names) + 0.12
    labels, height = 0.085 * max(map(len, rows)) + 0.25, 0.3 * len(rows)
    widths = [max(cell * len(names), 2.1) for names in broken]
    stacked = labels + sum(widths) > _WIDEST
    pitch = head + 0.4 + height
    figure = new_figure(
        (
            labels + (max(widths) if stacked else sum(widths) + 0.35 * (len(panels) - 1)) + 0.35,
            0.5 + pitch * (len(panels) if stacked else 1),
        )
    )
    wide, high = figure.get_size_inches()
    figure.text(0.08 / wide, 1 - 0.12 / high, title, weight="bold", size=12, va="top")
    for i, (panel, names) in enumerate(zip(panels, broken, strict=True)):
        left = labels + (0 if stacked else sum(widths[:i]) + 0.35 * i)
        bottom = high - 0.35 - pitch * (i + 1 if stacked else 1)
        axes = figure.add_axes((left / wide, bottom / high, widths[i] / wide, height / high))
        _paint(axes, panel)
        axes.set_title(panel.title, size=10, loc="left", pad=72 * head + 4)
        axes.set_xticks(range(len(names)), names, size=9)
        axes.set_yticks(range(len(rows)), rows if stacked or i == 0 else [], size=9)
        axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, pad=3)
        axes.axhline(len(rows) - sum_rows - 0.5, color="#1b1f24", linewidth=1.6)
    return to_png(figure)


def against_cost(
    x_titles: Sequence[str],
    y_title: str,
    points: Sequence[Point],
    logarithmic: Sequence[bool],
    *,
    logarithmic_y: bool = False,
    better: Literal["higher", "lower"] | None = None,
    coloured: Sequence[str] = (),
    whole: float | None = None,
) -> bytes:
    """One panel for each x, one marker for each point, one kind of marker for each series.

    better: a line joins those of its points that no other one beats in both x (the less the better) and y, and these
    are labelled, of markers that cover each other in a series the first; None: lines join all points, all are labelled.
    coloured: series in the order in which they get their colours and markers, of this plot and of others like it.
    whole: the x of which an axis above the panels gives the share.
    """
    series = list(dict.fromkeys(point.series for point in points))
    styles = {
        name: {"color": _COLOURS[s % len(_COLOURS)], "marker": _MARKERS[s % len(_MARKERS)]}
        for s, name in enumerate(dict.fromkeys((*coloured, *series)))
    }
    fronts = [[] if better is None else _fronts(points, i, better) for i in range(len(x_titles))]
    columns = min(len(series), 2 * len(x_titles))
    wrapped = ["\n".join(textwrap.wrap(name, _LEGEND_WIDTH)) for name in series]
    per_column = -(-len(series) // columns)
    lines = max(
        sum(name.count("\n") for name in wrapped[i : i + per_column]) for i in range(0, len(series), per_column)
    )
    legend_height = 0.22 * per_column + 0.15 * lines + 0.1
    figure = new_figure((max(6.1 * len(x_titles), 8), 4.7 + legend_height + 0.05 * max(len(points) - 12, 0)))
    panels = figure.subplots(1, len(x_titles), squeeze=False)[0]
    figure.subplots_adjust(
        left=0.85 / figure.get_figwidth(),
        right=0.985 if whole is None else 0.965,
        wspace=0.16,
        top=0.97 if whole is None else 0.94,
        bottom=(legend_height + 0.62) / figure.get_figheight(),
    )
    handles: dict[str, Any] = {}
    for i, axes in enumerate(panels):
        for name, joined in fronts[i]:
            axes.plot(*zip(*joined, strict=True), linewidth=0.7, color=styles[name]["color"])
        for name in series:
            mine = [(x, point.y) for point in points if point.series == name and (x := point.x[i]) is not None]
            handles[name] = axes.plot(
                *zip(*mine, strict=True) if mine else ([], []),
                markersize=8,
                linewidth=0.7 if better is None else 0,
                markeredgecolor="white",
                markeredgewidth=0.6,
                **styles[name],
            )[0]
        if logarithmic[i]:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        if logarithmic_y:
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        axes.margins(0.1)
        axes.autoscale_view()
        axes.set_xlabel(x_titles[i])
        axes.set_ylabel(y_title if i == 0 else "")
        axes.grid(color="#e3e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if whole is not None:
            _share_axis(axes, whole)
    figure.legend(
        [handles[name] for name in series], wrapped, loc="lower center", ncols=columns, frameon=False, fontsize=9
    )
    for i, axes in enumerate(panels):
        placed = [(x, point) for point in points if (x := point.x[i]) is not None]
        named = placed
        if better is not None:
            best = {(name, place) for name, joined in fronts[i] for place in joined}
            named = _apart(axes, [(x, point) for x, point in placed if (point.series, (x, point.y)) in best])
        labelled = [(x, point.y, point.label, styles[point.series]["color"]) for x, point in named]
        drawn = [line.get_xydata() for line in axes.lines if line.get_linewidth()]
        _label(axes, labelled, [(x, point.y) for x, point in placed], drawn)
    return to_png(figure)


def _share_axis(axes: Axes, whole: float) -> None:
    shares = axes.secondary_xaxis(
        "top", functions=(lambda x: np.multiply(x, 100 / whole), lambda x: np.multiply(x, whole / 100))
    )
    if axes.get_xscale() == "log":
        _plain_ticks(shares.xaxis)
    shares.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    shares.tick_params(length=2, labelsize=9)


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, .. on a logarithmic axis, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _fronts(points: Sequence[Point], panel: int, better: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Of every series and line the (x, y) that no other one beats in both, by x ascending."""
    sign = 1 if better == "higher" else -1
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for point in points:
        if (x := point.x[panel]) is not None:
            lines.setdefault((point.series, point.line), []).append((x, point.y))
    fronts = []
    for (series, _), places in lines.items():
        front: list[tuple[float, float]] = []
        for x, y in sorted(places, key=lambda place: (place[0], -sign * place[1])):
            if not front or sign * y > sign * front[-1][1]:
                front.append((x, y))
        fronts.append((series, front))
    return fronts


def _apart(axes: Axes, shown: Sequence[tuple[float, Point]]) -> list[tuple[float, Point]]:
    """The (x, point) whose marker does not cover that of an earlier one of its series."""
    size = 6 * _PIXELS_PER_INCH / 72
    kept: list[tuple[float, Point]] = []
    for x, point in shown:
        at = axes.transData.transform((x, point.y))
        others = [axes.transData.transform((x2, other.y)) for x2, other in kept if other.series == point.series]
        if all(np.abs(at - other).max() > size for other in others):
            kept.append((x, point))
    return kept


def _paint(axes: Axes, panel: Panel) -> None:
    values = panel.values
    colours: Colormap = _DROPS if panel.drops else _SCORES
    norm = Normalize(-DROP_COLOURS_END, DROP_COLOURS_END) if panel.drops else Normalize(0, 100)
    axes.imshow(np.ma.masked_invalid(values), cmap=colours.with_extremes(bad=_MISSING), norm=norm, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        value = float(values[row, column])
        red, green, blue, _ = colours(float(norm(value))) if np.isfinite(value) else (1, 1, 1, 1)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        text = number(value) if np.isfinite(value) else "\N{EN DASH}"
        axes.text(column, row, text, ha="center", va="center", size=9, color="white" if dark else "#1b1f24")
    axes.set_xticks(np.arange(values.shape[1] - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_color("#aab3bd")


def _label(
    axes: Axes, labelled: Sequence[tuple[float, float, str, str]], places: Sequence[tuple[float, float]], lines: Any
) -> None:
    """Writes the label of each (x, y, label, colour) where it covers least of the markers at `places`, the lines, each
    [n, 2], other labels and the edge."""
    pixel = _PIXELS_PER_INCH / 72
    inside = (axes.bbox.x0, axes.bbox.y0, axes.bbox.x1, axes.bbox.y1)
    markers = [axes.transData.transform((x, y)) for x, y, _, _ in labelled]
    taken = [_box(x, y, 10 * pixel, 10 * pixel) for x, y in map(axes.transData.transform, places)]
    for line in lines:
        for start, end in itertools.pairwise(axes.transData.transform(line) if len(line) else ()):
            pieces = 2 + int(np.hypot(*(end - start)) / (4 * pixel))
            taken += [_box(x, y, 4 * pixel, 4 * pixel) for x, y in np.linspace(start, end, pieces)[1:-1]]
    for (x, y), (*point, label, colour) in zip(markers, labelled, strict=True):
        if not label:
            continue
        width, height = 5.8 * len(label) * pixel, 9 * pixel
        least = np.inf
        for away, (right, up) in itertools.product((11, 20, 30), _DIRECTIONS):
            offset = (right * (away + width / pixel / 2 - 4), up * away)
            box = _box(x + offset[0] * pixel, y + offset[1] * pixel, width, height)
            outside = width * height - _overlap(box, inside)
            cost = sum(_overlap(box, other) for other in taken) + 2 * outside + away
            if cost < least:
                least, best, place = cost, box, offset
        taken.append(best)
        text: dict[str, Any] = {"size": 8.5, "ha": "center", "va": "center", "color": 0.75 * np.array(to_rgb(colour))}
        axes.annotate(label, (point[0], point[1]), place, textcoords="offset points", **text)


def _box(x: float, y: float, width: float, height: float) -> tuple[float, ...]:
    """Left, bottom, right and top of a rectangle around a point."""
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def new_figure(size: tuple[float, float]) -> Figure:
    """size in inches."""
    figure = Figure(figsize=size, dpi=_PIXELS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """The drawing with a palette of 256 colours, a third of the bytes."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    with PIL.Image.open(drawn) as image:
        image.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()
