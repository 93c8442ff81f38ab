"""A document of headings, paragraphs, tables and images, as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """warning: what a reader must not miss."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Cell:
    """text, and a detail that HTML sets smaller below it. strong: the detail is to be seen."""

    text: str
    detail: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """The first column names the rows. last_apart: the last row sums up the others. names: all columns are text."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    last_apart: bool = False
    names: bool = False


@dataclass(frozen=True)
class Image:
    """file: the name of the PNG file beside the documents; alt: what it shows, in words."""

    file: str
    png: bytes
    alt: str


@dataclass(frozen=True)
class Images:
    """Plots of one kind, side by side where there is room."""

    images: Sequence[Image]


Block = Heading | Paragraph | Table | Images


def to_markdown(blocks: Sequence[Block]) -> str:
    """The document as Markdown; the images are files of their names beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The document as a page that needs no other file; its images are part of it."""
    headings = [block for block in blocks if isinstance(block, Heading) and block.level in (2, 3)]
    marks = {id(heading): f"part-{number}" for number, heading in enumerate(headings, 1)}
    links = "\n".join(f'<a class="level{h.level}" href="#{marks[id(h)]}">{escape(h.text)}</a>' for h in headings)
    body = "\n".join(_html(block, marks.get(id(block))) for block in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<nav>\n{links}\n</nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_plain(block.text)}"
    if isinstance(block, Paragraph):
        return f"**Note:** {_plain(block.text)}" if block.warning else _plain(block.text)
    if isinstance(block, Images):
        return "\n\n".join(f"![{_plain(image.alt)}]({image.file})" for image in block.images)
    align = ["---"] + ["---" if block.names else "---:"] * (len(block.header) - 1)
    lines = [[_plain(text) for text in block.header], align]
    for number, row in enumerate(block.rows, 1):
        apart = block.last_apart and number == len(block.rows)
        lines.append([_markdown_cell(cell, apart and column == 0) for column, cell in enumerate(row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell, bold: bool) -> str:
    text = f"**{_plain(cell.text)}**" if bold else _plain(cell.text)
    detail = f"**{_plain(cell.detail)}**" if cell.strong else _plain(cell.detail)
    if cell.detail.startswith("["):
        return f"{text} {detail}"
    return f"{text} ({detail})" if detail else text


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, within a table too."""
    return re.sub(r"([\\|*`<])", r"\\\1", text).replace("\n", " ")


def _html(block: Block, mark: str | None) -> str:
    if isinstance(block, Heading):
        anchor = f' id="{mark}"' if mark else ""
        return f"<h{block.level}{anchor}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f'<p class="warning">{escape(block.text)}</p>' if block.warning else f"<p>{escape(block.text)}</p>"
    if isinstance(block, Images):
        return f'<div class="plots">\n{"".join(_html_image(image) for image in block.images)}</div>'
    head = "".join(f'<th scope="col">{escape(text).replace("_", "_<wbr>")}</th>' for text in block.header)
    rows = "\n".join(f"<tr>{_html_row(row)}</tr>" for row in block.rows)
    kinds = " ".join(name for name, holds in (("names", block.names), ("apart", block.last_apart)) if holds)
    table = f'<table class="{kinds}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>'
    return f'<div class="table">{table}</div>'


def _html_row(row: Sequence[Cell]) -> str:
    cells = [f'<th scope="row">{escape(row[0].text)}</th>']
    for cell in row[1:]:
        kind = ' class="strong"' if cell.strong else ""
        # Breaks before an interval alone, and only where the table is too wide.
        unbroken = escape(cell.detail).replace(" ", "&nbsp;").replace("&nbsp;[", " [")
        detail = f"<small{kind}>{unbroken}</small>" if cell.detail else ""
        cells.append(f"<td>{escape(cell.text)}{detail}</td>")
    return "".join(cells)


def _html_image(image: Image) -> str:
    width = int.from_bytes(image.png[16:20], "big") // 2  # drawn at twice the size it is shown at
    encoded = base64.b64encode(image.png).decode("ascii")
    return f'<img width="{width}" alt="{escape(image.alt)}" src="data:image/png;base64,{encoded}">\n'


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; color: #1b1f24; background: #fff; font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
nav { display: flex; flex-wrap: wrap; gap: .2em 1.2em; padding: .7em 2em; background: #f3f5f7; font-size: .85em; }
nav a { color: #0b4f8a; text-decoration: none; }
nav a:hover { text-decoration: underline; }
nav .level2 { flex-basis: 100%; font-weight: 600; }
main { max-width: 1600px; margin: 0 auto; padding: 0 2em 4em; }
h1 { font-size: 1.9em; margin: 1em 0 .4em; }
h2 { font-size: 1.45em; margin: 2em 0 .5em; padding-bottom: .2em; border-bottom: 2px solid #d5dae0; }
h3 { font-size: 1.12em; margin: 1.9em 0 .5em; }
p { max-width: 62em; margin: .5em 0; }
.warning { border-left: 5px solid #b45309; background: #fff6e5; padding: .6em 1em; }
.warning + .warning { margin-top: -.5em; padding-top: 0; }
.table { overflow-x: auto; margin: .8em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .32em .8em; text-align: right; vertical-align: top; border-bottom: 1px solid #e3e7eb; }
thead th { min-width: 4.5em; border-bottom: 2px solid #aab3bd; vertical-align: bottom; }
th:first-child, .names th, .names td { text-align: left; }
tbody th { font-weight: 500; position: sticky; left: 0; background: #fff; }
.names td { overflow-wrap: anywhere; min-width: 6em; }
tbody tr:hover > * { background: #f6f8fa; }
.apart tbody tr:last-child > * { border-top: 2px solid #aab3bd; font-weight: 600; }
td small { display: block; font-size: .8em; font-weight: 400; color: #56606b; }
td small.strong { color: #1b1f24; font-weight: 700; }
.plots { display: flex; flex-wrap: wrap; gap: 1.2em 2em; margin: .8em 0; }
.plots img { max-width: 100%; height: auto; }
@media print { nav { display: none; } h2, h3 { break-after: avoid; } table, img { break-inside: avoid; } }
"""
