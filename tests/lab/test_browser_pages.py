"""The reports as a reader sees them, on a desktop and on a phone."""

import shutil
import tarfile
from pathlib import Path

import browser
import pytest

from kalmannorm.lab import experiments, figures, page

COLOURS = {"BN": "#c44e52", "KN": "#4c72b0"}
STYLE = Path(page.__file__).with_name("page.html").read_text(encoding="utf-8").split("style>")[1].removesuffix("</")
SIZES = pytest.mark.parametrize("size", [browser.DESKTOP, browser.PHONE], ids=["desktop", "phone"])


@pytest.fixture(scope="module")
def chromium():
    with browser.started() as started:
        yield started


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A page with every kind of block, each with more in it than fits."""
    path, wide = "a/very/long/path/" * 12, [[f"{i}.25 ± 0.75" for i in range(14)]] * 2
    drawing = figures.search({"KalmanNorm": [(0.1, 90.0), (0.3, 80.0)]}, {"KalmanNorm": "#4c72b0"}, "rate")
    arm = {"title": "The configuration " + path, "command": "x" * 300, "notes": [path], "config": "y: " * 100}
    text = page.render(
        title="A title that says a lot, " * 3, question=path, verdict=f"KalmanNorm is best, says {path}.",
        grids=[("A wide table. " * 9, wide)], notes=[path] * 20, gaps=[], is_table=True, metric="accuracy " * 20,
        curves=[("A figure. " * 20, page._drawn(drawing))], search=page._drawn(drawing), summary=wide,
        command="z" * 300, arms=[arm, arm], environment=path,
    )  # fmt: skip
    written = tmp_path_factory.mktemp("page") / "page.html"
    written.write_text(text, encoding="utf-8")
    return written


@SIZES
def test_every_kind_of_block_fits(chromium, everything, size):
    found = browser.look(chromium, everything, size)
    browser.assert_readable(found)
    assert found.facts["images"] == 2
    assert found.screenshot.startswith(b"\x89PNG")


def test_a_folded_part_is_folded_until_it_is_opened(chromium, everything):
    assert "xxx" not in browser.look(chromium, everything, open_details=False).facts["text"]
    assert "xxx" in browser.look(chromium, everything).facts["text"]


ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "results" / "studies"


@pytest.fixture(scope="module", params=["signals", "fine-tuning-cpu"])
def written(request, tmp_path_factory):
    """Of a study's kept files, and its learning curves from the archive."""
    folder = shutil.copytree(KEPT / request.param, tmp_path_factory.mktemp("page") / request.param)
    with tarfile.open(ROOT / "history" / "curves.tar.xz") as archive:
        archive.extract(f"{request.param}/curves.csv", folder.parent, filter="data")
    return page.write_page(experiments.read(request.param), folder)


@SIZES
def test_an_experiments_page_fits(chromium, written, size):
    found = browser.look(chromium, written, size)
    browser.assert_readable(found)
    assert found.facts["images"] >= 2
    assert "mean ± standard deviation over 3 seeds" in found.facts["text"]


def test_a_line_that_is_pointed_at_has_a_name_and_the_others_fade(chromium, tmp_path):
    drawing = figures.search({"BN": [(0.1, 90.0), (0.3, 80.0)], "KN": [(0.1, 70.0), (0.3, 75.0)]}, COLOURS, "rate")
    path = tmp_path / "page.html"
    path.write_text(f"<style>{STYLE}</style>{page._drawn(drawing)}", encoding="utf-8")
    shown = chromium.new_page()
    shown.goto(path.as_uri())
    lines = shown.locator(".line")
    opacity = "lines => lines.map(line => getComputedStyle(line).opacity)"
    assert lines.locator("title").all_text_contents() == ["BN", "KN"]
    assert lines.evaluate_all(opacity) == ["1", "1"]
    lines.first.locator("path").nth(1).hover()
    assert lines.evaluate_all(opacity) == ["1", "0.2"]
    shown.close()


def test_a_page_that_is_wrong_is_found_out(chromium, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("""<!doctype html><meta name="viewport" content="width=device-width"><body>
        <div style="width: 2000px">wide</div>
        <p style="overflow: hidden; width: 50px; white-space: nowrap">cut off here</p>
        <img alt="broken" src="data:image/png;base64,AAAA">
        <a href="#nowhere">link</a>
        <script>console.error("no")</script><img src="http://127.0.0.1:9/x.png">""")
    found = browser.look(chromium, path)
    counts = {wrong: len(found.facts[wrong]) for wrong in ("outside", "clipped", "undecoded", "dangling")}
    assert counts == {"outside": 1, "clipped": 1, "undecoded": 2, "dangling": 1}
    assert "no" in found.errors
    assert any("asked for http://127.0.0.1:9" in error for error in found.errors)
    found.errors.clear()
    for wrong in ("overflow", *counts):
        with pytest.raises(AssertionError):
            browser.assert_readable(found)
        found.facts[wrong] = 0 if wrong == "overflow" else []
    browser.assert_readable(found)
