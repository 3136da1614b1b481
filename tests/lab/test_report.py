"""The HTML report: self-contained, and safe against what it is given."""

import re

from matplotlib.figure import Figure

from kalmannorm.lab import report


def test_a_page_holds_everything_itself(tmp_path):
    drawing = Figure(figsize=(1, 1))
    drawing.subplots().plot([1, 2])
    blocks = [
        report.heading("One < two"),
        report.table(["", "a & b"], [["row", "1 ± 2"]]),
        report.figure(drawing, "A line"),
        report.command("kalmannorm demo --methods 'bn'"),
    ]
    page = report.write(tmp_path / "page.html", "Title", blocks).read_text(encoding="utf-8")
    assert '<h2 id="one-two">One &lt; two</h2>' in page
    assert "<th>a &amp; b</th>" in page
    assert "<td>1 ± 2</td>" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in page
    assert "<script" not in page


def test_contents_lead_to_their_headings():
    titles = ["Table 8: CIFAR-10", "bs = 2 & more", "Größe"]
    targets = re.findall(r'href="#([^"]*)"', report.contents(titles))
    assert targets == [re.search(r'id="([^"]*)"', report.heading(title)).group(1) for title in titles]
    assert len(set(targets)) == 3


def test_what_is_given_is_text_and_not_html():
    given = "<b>&</b>"
    for block in (
        report.note(given),
        report.verdict(given),
        report.details(given, []),
        report.contents([given]),
        report.table([given], [[given]], given),
        report.command(given),
    ):
        assert "&lt;b&gt;&amp;&lt;/b&gt;" in block
        assert "<b>" not in block
    assert "<p>inside</p>" in report.details("outside", [report.paragraph("inside")])
