"""What autodoc and napoleon need to be told of this library's docstrings."""

from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

# Napoleon takes what stands before a colon in an attribute's docstring for its type. These have sentences.
_OF_ATTRIBUTES = ("attribute", "property", "data")


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    kept: dict[str, list[str]] = {}

    def keep(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        kept[name] = list(lines)

    def put_back(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        if what in _OF_ATTRIBUTES:
            lines[:] = kept[name]

    app.connect("autodoc-process-docstring", keep, priority=400)  # before napoleon, at 500
    app.connect("autodoc-process-docstring", put_back, priority=600)
    app.connect("missing-reference", _by_last_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _by_last_name(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref,
                  content: nodes.Element) -> nodes.Node | None:  # fmt: skip
    """A name as the module that wrote it knows it, `Gaussian` say, where the page has `kalmannorm.Gaussian`."""
    if node.get("refdomain") != "py":
        return None
    last = str(node.get("reftarget", "")).rpartition(".")[2]
    domain = env.domains.python_domain
    found = [name for name in domain.objects if name.startswith("kalmannorm.") and name.rpartition(".")[2] == last]
    if not found or node["reftarget"].startswith("torch"):
        return None
    target = min(found, key=len)
    entry = domain.objects[target]
    reference = nodes.reference("", "", content, internal=True, reftitle=target)
    reference["refuri"] = f"{app.builder.get_relative_uri(node['refdoc'], entry.docname)}#{entry.node_id}"
    return reference
