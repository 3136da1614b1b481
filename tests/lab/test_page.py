"""The page of an experiment: self-contained, safe against what it is given, and as readers see it on two screens."""

import re
import shutil
import tarfile
from pathlib import Path

import browser
import pytest

from kalmannorm.lab import experiments, figures, page

GIVEN = "<B>&</B>"
COLOURS = {"BN": "#c44e52", "KN": "#4c72b0"}
STYLE = Path(page.__file__).with_name("page.html").read_text(encoding="utf-8").split("style>")[1].removesuffix("</")
SIZES = pytest.mark.parametrize("size", [browser.DESKTOP, browser.PHONE], ids=["desktop", "phone"])
ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "results" / "studies"


def drawn(name="KN"):
    points = {"BN": [(0.1, 90.0), (0.3, 80.0)], name: [(0.1, 70.0), (0.3, 75.0)]}
    return page._drawn(figures.search(points, {"BN": COLOURS["BN"], name: COLOURS["KN"]}, "rate"))


def rendered(text, path, folded, grid, gaps):
    """A page with every kind of block, on which each text, path and command is this one."""
    texts = dict.fromkeys(("title", "metric"), text) | dict.fromkeys(("question", "verdict", "environment"), path)
    arm = {"title": path, "command": folded, "notes": [path], "config": folded}
    return page.render(
        **texts, gaps=gaps, curves=[(text, drawn(text[:40]))], search=drawn(text[:40]), grids=[(text, grid)],
        notes=[path], command=folded.upper(), summary=grid, is_table=True, arms=[arm],
    )  # fmt: skip


@pytest.fixture(scope="module")
def unsafe():
    return rendered(GIVEN, GIVEN, GIVEN, [[GIVEN, GIVEN], [GIVEN, "1 ± 2"]], [(GIVEN, "AAAA")])


def test_a_page_holds_everything_itself(unsafe):
    assert '<h2 id="the-search">The search</h2>' in unsafe
    assert "<td>1 ± 2</td>" in unsafe
    sources = re.findall(r' (?:src|href)="([^"]*)"', unsafe)
    assert len(sources) == 2
    assert unsafe.count("<svg ") == 2
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in unsafe
    assert "<script" not in unsafe


def test_what_is_given_is_text_and_not_html(unsafe):
    assert "<B>" not in unsafe
    assert unsafe.count("&lt;B&gt;&amp;&lt;/B&gt;") == 24 + 2  # with the name of a line in each figure


@pytest.fixture(scope="module")
def chromium():
    with browser.started() as started:
        yield started


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """Each block has more in it than fits."""
    wide = [[f"{i}.25 ± 0.75" for i in range(14)]] * 2
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(rendered("Says a lot. " * 20, "a/long/path/" * 20, "x" * 300, wide, []), encoding="utf-8")
    return path


@SIZES
def test_every_kind_of_block_fits(chromium, crowded, size):
    found = browser.look(chromium, crowded, size)
    browser.assert_readable(found)
    assert found.facts["images"] == 2
    assert found.screenshot.startswith(b"\x89PNG")


def test_a_folded_part_is_folded_until_it_is_opened(chromium, crowded):
    assert "xxx" not in browser.look(chromium, crowded, open_details=False).facts["text"]
    assert "xxx" in browser.look(chromium, crowded).facts["text"]


@pytest.mark.parametrize("name", ["signals", "fine-tuning-cpu"])
def test_an_experiments_page_fits(chromium, name, tmp_path):
    """Of a study's kept files, and its learning curves from the archive."""
    folder = shutil.copytree(KEPT / name, tmp_path / name)
    with tarfile.open(ROOT / "history" / "curves.tar.xz") as archive:
        archive.extract(f"{name}/curves.csv", tmp_path, filter="data")
    written = page.write_page(experiments.read(name), folder)
    for size in (browser.DESKTOP, browser.PHONE):
        found = browser.look(chromium, written, size)
        browser.assert_readable(found)
        assert found.facts["images"] >= 2
        assert "mean ± standard deviation over 3 seeds" in found.facts["text"]


def test_a_line_that_is_pointed_at_has_a_name_and_the_others_fade(chromium, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(f"<style>{STYLE}</style>{drawn()}", encoding="utf-8")
    shown = chromium.new_page()
    shown.goto(path.as_uri())
    lines = shown.locator(".line")
    opacity = "lines => lines.map(line => getComputedStyle(line).opacity)"
    assert lines.locator("title").all_text_contents() == ["BN", "KN"]
    assert lines.evaluate_all(opacity) == ["1", "1"]
    lines.first.locator("path").nth(1).hover()
    assert lines.evaluate_all(opacity) == ["1", "0.2"]
    shown.close()
