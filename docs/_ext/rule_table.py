"""`{rule-table}`: which torch functions have a rule, read from the library when the site is built."""

import sys
from collections import defaultdict

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from kalmannorm import rules


def rows() -> dict[str, list[str]]:
    """For each module of rules, the names of the functions it moves beliefs through."""
    found: dict[str, set[str]] = defaultdict(set)
    for function, rule in rules.RULES.items():
        name = getattr(function, "__name__", str(function))
        if not name.startswith("__") or name.endswith("__"):
            found[rule.__module__.rpartition(".")[2]].add(name)
    return {module: sorted(names, key=str.lower) for module, names in sorted(found.items())}


class RuleTable(SphinxDirective):
    """The directive."""

    def run(self) -> list[nodes.Node]:
        """A table with a row a module."""
        lines = ["| kind | functions and methods |", "|---|---|"]
        for module, names in rows().items():
            summary = (sys.modules[f"kalmannorm.rules.{module}"].__doc__ or "").partition("\n")[0].rstrip(".")
            lines.append(f"| `{module}`: {summary} | {', '.join(f'`{name}`' for name in names)} |")
        section = nodes.container()
        self.state.nested_parse(StringList(lines, "rule-table"), 0, section)
        return section.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("rule-table", RuleTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
