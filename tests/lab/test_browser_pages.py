"""The reports as a reader sees them, on a desktop and on a phone."""

import shutil
from pathlib import Path

import browser
import pytest

from kalmannorm.lab import experiments, figures, page, report

SIZES = pytest.mark.parametrize("size", [browser.DESKTOP, browser.PHONE], ids=["desktop", "phone"])


@pytest.fixture(scope="module")
def chromium():
    with browser.started() as started:
        yield started


def drawing():
    return figures.search({"KalmanNorm": [(0.1, 90.0), (0.3, 80.0)]}, {"KalmanNorm": "#4c72b0"}, "rate")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A page with every kind of block, each with more in it than fits."""
    path, titles = "a/very/long/path/" * 12, ["First", "Second: a heading of many words that goes on and on"]
    blocks = [
        report.contents(titles),
        report.verdict(f"KalmanNorm is best, says {path}."),
        *(report.heading(title) for title in titles),
        report.table([f"column {i}" for i in range(14)], [[f"{i}.25 ± 0.75" for i in range(14)]], "A wide table. " * 9),
        report.figure(drawing(), "A figure. " * 20),
        report.note(path),
        report.details("The configuration " + path, [report.command("x" * 300), report.figure(drawing(), "again")]),
        *(report.paragraph("Something to scroll past.") for _ in range(40)),
    ]
    return report.write(tmp_path_factory.mktemp("page") / "page.html", "A title that says a lot, " * 3, blocks)


@SIZES
def test_every_kind_of_block_fits(chromium, everything, size):
    found = browser.look(chromium, everything, size)
    browser.assert_readable(found)
    assert found.facts["images"] == 2
    assert found.screenshot.startswith(b"\x89PNG")


def test_a_folded_part_is_folded_until_it_is_opened(chromium, everything):
    assert "xxx" not in browser.look(chromium, everything, open_details=False).facts["text"]
    assert "xxx" in browser.look(chromium, everything).facts["text"]


KEPT = Path(__file__).parents[2] / "docs" / "results" / "studies"


@SIZES
def test_an_experiments_page_fits(chromium, tmp_path, size):
    for name in ("signals", "fine-tuning-cpu"):
        shutil.copytree(KEPT / name, tmp_path / name)
        found = browser.look(chromium, page.write_page(experiments.read(name), tmp_path / name), size)
        browser.assert_readable(found)
        assert found.facts["images"] >= 2
        assert "mean ± standard deviation over 3 seeds" in found.facts["text"]


def broken(block):
    return f'<!doctype html><meta name="viewport" content="width=device-width"><body>{block}'


@pytest.mark.parametrize(
    ("block", "wrong"),
    [
        ('<div style="width: 2000px">wide</div>', "outside"),
        ('<p style="overflow: hidden; width: 50px; white-space: nowrap">cut off here</p>', "clipped"),
        ('<img alt="broken" src="data:image/png;base64,AAAA">', "undecoded"),
        ('<a href="#nowhere">link</a>', "dangling"),
    ],
)
def test_a_page_that_is_wrong_is_found_out(chromium, tmp_path, block, wrong):
    path = tmp_path / "page.html"
    path.write_text(broken(block), encoding="utf-8")
    found = browser.look(chromium, path)
    assert len(found.facts[wrong]) == 1
    with pytest.raises(AssertionError):
        browser.assert_readable(found)


def test_what_the_console_says_and_what_is_fetched_is_found_out(chromium, tmp_path):
    path = tmp_path / "page.html"
    block = "<script>console.error('no')</script><img src='http://127.0.0.1:9/x.png'>"
    path.write_text(broken(block), encoding="utf-8")
    errors = browser.look(chromium, path).errors
    assert "no" in errors
    assert any("asked for http://127.0.0.1:9" in error for error in errors)
