"""The page of an experiment: self-contained, and safe against what it is given."""

import re

import pytest
from matplotlib.figure import Figure

from kalmannorm.lab import page

GIVEN = "<b>&</b>"


@pytest.fixture(scope="module")
def written():
    """A page on which every text is the same one."""
    drawing = Figure(figsize=(1, 1))
    drawing.subplots().plot([1, 2], label=GIVEN)
    arm = {"title": GIVEN, "command": GIVEN, "notes": [GIVEN], "config": GIVEN}
    grid, picture = [[GIVEN, GIVEN], [GIVEN, "1 ± 2"]], page._drawn(drawing)
    texts = dict.fromkeys(("title", "question", "verdict", "metric", "command", "environment"), GIVEN)
    return page.render(
        **texts, gaps=[(GIVEN, "AAAA")], curves=[(GIVEN, picture)], search=picture, grids=[(GIVEN, grid)],
        notes=[GIVEN], summary=grid, is_table=True, arms=[arm],
    )  # fmt: skip


def test_a_page_holds_everything_itself(written):
    assert '<h2 id="the-search">The search</h2>' in written
    assert "<td>1 ± 2</td>" in written
    sources = re.findall(r' (?:src|href)="([^"]*)"', written)
    assert len(sources) == 2
    assert written.count("<svg ") == 2
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in written
    assert "<script" not in written


def test_what_is_given_is_text_and_not_html(written):
    assert "<b>" not in written
    assert written.count("&lt;b&gt;&amp;&lt;/b&gt;") == 24
