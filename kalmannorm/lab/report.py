"""Self-contained HTML reports: one file, no scripts, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2430; max-width: 62rem; margin: 2rem auto; }
body { padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; text-align: right; border-bottom: 1px solid #dde2ea; }
th { border-bottom: 2px solid #8a94a6; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
td:not(:first-child) { white-space: nowrap; }
figcaption, .note { color: #566072; font-size: .9rem; }
.scroll { overflow-x: auto; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
p, li, figcaption, summary { overflow-wrap: anywhere; }
pre { background: #f3f5f8; padding: .7rem 1rem; overflow-x: auto; border-radius: 4px; }
.verdict { border-left: 4px solid #4c72b0; background: #f3f5f8; padding: .6rem 1rem; font-size: 1.05rem; }
nav ul { columns: 16rem; padding-left: 1.2rem; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  th, td { padding: .4rem; }
  figure img { max-width: 44rem; } /* or its text would be too small to read */
}
"""


def anchor(title: str) -> str:
    """What a link to a section calls it."""
    return re.sub(r"[^\w.]+", "-", title.lower()).strip("-")


def heading(text: str) -> str:
    """A section's heading, which a link can go to."""
    return f'<h2 id="{escape(anchor(text))}">{escape(text)}</h2>'


def contents(titles: Sequence[str]) -> str:
    """Links to the sections with these headings."""
    links = "".join(f'<li><a href="#{escape(anchor(title))}">{escape(title)}</a></li>' for title in titles)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    """A paragraph that explains, smaller than the text."""
    return f'<p class="note">{escape(text)}</p>'


def verdict(text: str) -> str:
    """A paragraph that says what it all comes to."""
    return f'<p class="verdict">{escape(text)}</p>'


def command(text: str) -> str:
    """A line to copy into a shell, or lines of a file."""
    return f"<pre><code>{escape(text)}</code></pre>"


def details(summary: str, blocks: Sequence[str]) -> str:
    """Blocks of HTML that are folded away under one line of plain text."""
    body = "\n".join(blocks)
    return f"<details>\n<summary>{escape(summary)}</summary>\n{body}\n</details>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose first column holds names and whose others hold numbers; it scrolls where it is too wide."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    inside = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    # The caption is outside of what scrolls: it would be as wide as the table.
    title = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="scroll"><table>\n{inside}\n</table></div>{title}</figure>'


def figure(drawing: Figure, caption: str) -> str:
    """A matplotlib figure, drawn into the page, over its caption."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return picture(buffer.getvalue(), caption)


def picture(png: bytes, caption: str) -> str:
    """A picture as PNG, over its caption."""
    data = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="scroll">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'


def write(path: Path, title: str, blocks: Sequence[str]) -> Path:
    """Write ``blocks`` of HTML as one page to ``path``, and return it."""
    body = "\n".join(blocks)
    path.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return path
