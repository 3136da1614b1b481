"""Keeps a mean and its deviation on one line: ``52.1 ± 1.7`` gets spaces that do not break."""

from docutils import nodes
from sphinx.application import Sphinx


def keep_together(app: Sphinx, doctree: nodes.document) -> None:
    """Replace the spaces around each sign."""
    for text in list(doctree.findall(nodes.Text)):
        if " ± " in text:
            text.parent.replace(text, nodes.Text(text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")))


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("doctree-read", keep_together)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
