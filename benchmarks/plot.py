"""Write figures and tables from CSVs of ``python -m benchmarks`` into a page.

Only the text between ``<!-- goals -->`` and ``<!-- /goals -->`` is replaced, and that between the marks of ``cpu`` and
``cuda``.
"""

import argparse
import os
import re
from pathlib import Path

import matplotlib as mpl

from benchmarks import figures, rows, tables

DEVICES = ("cpu", "cuda")


def fill(page, name, text):
    """Replace the text between a page's two marks.

    Raises:
        ValueError: A mark is missing.
    """
    marks = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no place for {name!r}: expected {marks[0]} and {marks[1]}")
    return pattern.sub(lambda _: f"{marks[0]}\n{text}\n{marks[1]}", page)


def draw(found, device, folder):
    """Save a device's figures, and yield their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    # Makes the files reproducible.
    with mpl.rc_context({"svg.hashsalt": "kalmannorm", "svg.fonttype": "none"}):
        for name, figure in figures.of_device(found).items():
            path = folder / f"{device}-{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            yield path


def section(found, device, page, folder, sources):
    """A device's part of the page."""
    if not found:
        return "Not measured yet."
    links = ", ".join(f"[{path.name}]({os.path.relpath(path, page.parent)})" for path in sources)
    pictures = [f"![{path.stem}]({os.path.relpath(path, page.parent)})" for path in draw(found, device, folder)]
    return "\n\n".join((f"{tables.measured_by(found)} Rows: {links}.", *pictures, tables.of_device(found)))


def main(given=None):
    parser = argparse.ArgumentParser("python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="*")
    parser.add_argument("--page", type=Path, required=True, help="a Markdown file with the marks")
    parser.add_argument("--figures", type=Path, required=True, help="folder for the figures")
    options = parser.parse_args(given)
    # Other CSVs in the folder, such as profiles, have other columns.
    read = {path: rows.read(path) for path in options.csv if path.exists() and rows.header(path) == rows.COLUMNS}
    found = [row for table in read.values() for row in table]
    page = fill(options.page.read_text(), "goals", tables.goals(found))
    for device in DEVICES:
        own = [row for row in found if row["device"] == device]
        sources = [path for path, table in read.items() if any(row["device"] == device for row in table)]
        page = fill(page, device, section(own, device, options.page, options.figures, sources))
    options.page.write_text(page)
    print(f"{options.page}: {len(found)} rows of {len(read)} files")


if __name__ == "__main__":
    main()
