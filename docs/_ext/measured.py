"""Tables of results, read from `docs/results` when the site is built: `{measured} NAME` shows those of a study.

They are the tables of accuracies of `results/studies/NAME/table.md`, which `kalmannorm run --report` makes from the
file of runs. With `:optional:`, nothing is shown until the study is there.
"""

from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def scores(table: str) -> str:
    """The part of a study's page from how it was scored to the last of its tables of scores."""
    parts = table.split("\n\n")
    first = next(i for i, part in enumerate(parts) if part.startswith("In per cent"))
    last = next(i for i, part in enumerate(parts) if part.startswith("| arm "))
    return "\n\n".join(parts[first:last])


class Measured(SphinxDirective):
    """The directive."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {"optional": directives.flag}

    def run(self) -> list[nodes.Node]:
        """The tables, behind what the directive holds."""
        name = self.arguments[0]
        page = Path(self.env.srcdir) / "results" / "studies" / name / "table.md"
        self.env.note_dependency(str(page))
        if not page.is_file():
            if "optional" in self.options:
                return []
            raise self.error(f"there is no {page}")
        told = [*self.content, "", *scores(page.read_text(encoding="utf-8")).splitlines(), ""]
        told += [f"Rates chosen, notes, machine and commit: {{doc}}`/results/studies/{name}/table`."]
        section = nodes.container()
        self.state.nested_parse(StringList(told, str(page)), 0, section)
        return section.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
