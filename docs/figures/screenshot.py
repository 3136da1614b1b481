"""Makes docs/figures/comparison.png, the page that a comparison writes: ``python docs/figures/screenshot.py [FILE]``.

The page is of a committed study, with its learning curves from history/curves.tar.xz. A browser draws it.
"""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from kalmannorm.lab import cli

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STUDY = "true-batches-cpu"
WIDTH = 1000


def report(folder: Path) -> Path:
    """Write the study's page into a folder, as ``kalmannorm run STUDY --report`` does, and return its path."""
    shutil.copytree(ROOT / "docs" / "results" / "studies" / STUDY, folder / STUDY)
    with tarfile.open(ROOT / "history" / "curves.tar.xz") as archive:
        archive.extract(f"{STUDY}/curves.csv", folder, filter="data")
    if cli.main(["run", STUDY, "--report", "--output", str(folder)]):
        raise RuntimeError(f"kalmannorm run {STUDY} --report failed")
    return folder / STUDY / "report.html"


def screenshot(browser: Any, page_file: Path) -> Image.Image:
    """The page from its top to the end of its learning curves, in 64 colours."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 900})
    page.goto(page_file.as_uri())
    end = page.locator("h2", has_text="The search").bounding_box()["y"]
    png = page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": end}, full_page=True)
    page.close()
    return Image.open(io.BytesIO(png)).convert("RGB").quantize(64)


def main(file: Path = HERE / "comparison.png") -> Path:
    """Make the picture."""
    sys.path.append(str(ROOT / "tests"))
    import browser  # noqa: PLC0415 - how tests find one

    with tempfile.TemporaryDirectory() as folder, browser.started() as started:
        screenshot(started, report(Path(folder))).save(file, optimize=True)
    return file


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:2])))
