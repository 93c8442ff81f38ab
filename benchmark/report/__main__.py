"""Makes report.md, report.html (one self-contained page) and PNG plots from results folders of benchmark.runner.

python -m benchmark.report RESULTS... --output FOLDER. Folders of one benchmark and model share tables: several context
lengths, or several strategies. Exit status 2: bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from benchmark.results import write_text

from .blocks import Images, to_html, to_markdown
from .groups import group_folders
from .load import read_folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="folders with a results.json")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder for the report")
    parser.add_argument(
        "--allow_mixed", action="store_true", help="compare folders whose protocols differ in more than the length"
    )
    return parser.parse_args(argv)


def make_report(results: list[Path], output: Path, allow_mixed: bool = False) -> list[Path]:
    """Writes the report of results folders into `output` and returns its files, report.html first.

    Raises ModuleNotFoundError without matplotlib, ValueError and FileNotFoundError for what load.read_folder and
    groups.group_folders refuse, all before anything is written.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError('the plots need matplotlib: python -m pip install -e ".[benchmark]"')
    from .page import TITLE, document  # imports matplotlib

    if output.exists() and not output.is_dir():
        raise ValueError(f"output: got the file {output}, allowed: a folder")
    blocks = document(group_folders([read_folder(path) for path in results], allow_mixed))
    output.mkdir(parents=True, exist_ok=True)
    images = [image for block in blocks if isinstance(block, Images) for image in block.images]
    for image in images:
        _write_bytes(output / image.file, image.png)
    write_text(output / "report.md", to_markdown(blocks))
    write_text(output / "report.html", to_html(blocks, TITLE))
    return [output / name for name in ("report.html", "report.md", *(image.file for image in images))]


def _write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all, as benchmark.results.write_text."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".report") as folder:
        (Path(folder) / path.name).write_bytes(content)
        os.replace(Path(folder) / path.name, path)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        files = make_report(args.results, args.output, args.allow_mixed)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
