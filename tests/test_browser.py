"""The browser finds what is wrong with a page."""

import browser
import pytest


def test_a_page_that_is_wrong_is_found_out(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("""<!doctype html><meta name="viewport" content="width=device-width"><body>
        <div style="width: 2000px">wide</div>
        <p style="overflow: hidden; width: 50px; white-space: nowrap">cut off here</p>
        <img alt="broken" src="data:image/png;base64,AAAA">
        <a href="#nowhere">link</a>
        <script>console.error("no")</script><img src="http://127.0.0.1:9/x.png">""")
    with browser.started() as chromium:
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
