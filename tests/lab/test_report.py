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
    assert "<h2>One &lt; two</h2>" in page
    assert "<th>a &amp; b</th>" in page
    assert "<td>1 ± 2</td>" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in page
    assert "<script" not in page
