"""Looks at a page as a reader does: in a browser, at a desktop's width and at a phone's."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DESKTOP, PHONE = (1280, 900), (390, 844)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# What a reader would stumble over. Scrolling boxes may hold what is wider than they are; nothing else may.
FACTS = """() => {
  const wide = document.documentElement.clientWidth;
  const scrolls = e => /auto|scroll/.test(getComputedStyle(e).overflowX);
  const held = e => Boolean(e.parentElement) && (scrolls(e.parentElement) || held(e.parentElement));
  const name = e => e.tagName.toLowerCase() + ": " + (e.textContent || e.alt || "").trim().slice(0, 60);
  const scale = svg => svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  const all = [...document.body.querySelectorAll("*")];
  const shown = all.filter(e => e.getClientRects().length);
  return {
    overflow: document.documentElement.scrollWidth - wide,
    outside: shown.filter(e => !held(e) && e.getBoundingClientRect().right > wide + 1).map(name),
    clipped: shown.filter(e => !scrolls(e) && /hidden|clip/.test(getComputedStyle(e).overflowX)
                               && e.scrollWidth > e.clientWidth + 1).map(name),
    undecoded: [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(name),
    images: document.querySelectorAll("img, figure svg").length,
    smallest: Math.min(...shown.filter(e => e.textContent.trim()).map(e => parseFloat(getComputedStyle(e).fontSize)
                                                                         * scale(e.closest("svg")))),
    dangling: [...document.querySelectorAll("a[href^='#']")]
      .filter(a => !document.getElementById(decodeURIComponent(a.getAttribute("href").slice(1)))).map(name),
    text: document.body.innerText,
  };
}"""


@dataclass
class Look:
    """What was seen.

    Attributes:
        facts: See `FACTS`; lists name the elements that are wrong.
        errors: What the console and the page complained of, and what it asked of other places.
        screenshot: The whole page, as PNG.
    """

    facts: dict[str, Any]
    errors: list[str]
    screenshot: bytes


def path() -> str | None:
    """The browser, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def started() -> Iterator[Any]:
    """A browser, for several looks; the test skips where none is installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = path()
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def look(browser: Any, page_file: Path, size: tuple[int, int] = DESKTOP, *, open_details: bool = True) -> Look:
    """Open a file and look at all of it, folded parts included."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"failed: {request.url[:80]}"))
    page.on(
        "request", lambda r: None if r.url.startswith(("file:", "data:")) else errors.append(f"asked for {r.url[:80]}")
    )
    try:
        page.goto(page_file.resolve().as_uri())
        if open_details:
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        return Look(page.evaluate(FACTS), errors, page.screenshot(full_page=True))
    finally:
        page.close()


def assert_readable(found: Look) -> None:
    """Nothing sticks out or is cut off, every image is there, text is large enough, and nobody complains."""
    assert found.errors == []
    assert found.facts["overflow"] <= 0, found.facts["outside"]
    for wrong in ("outside", "clipped", "undecoded", "dangling"):
        assert found.facts[wrong] == [], wrong
    assert found.facts["smallest"] >= 11
