"""Links from a page to what is in the repository but no page of the site: folders, and files beside `docs`.

On a code host these links open the folder. In the site they lead there if `KALMANNORM_REPOSITORY` says where the
repository is shown (an address that a path is put behind), and are text with the path otherwise.
"""

import os
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

REPOSITORY = os.environ.get("KALMANNORM_REPOSITORY", "").rstrip("/")


class Places(SphinxTransform):
    """Replaces references to folders before MyST looks for a page of that name."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        """Go through the page."""
        here = Path(self.env.doc2path(self.env.docname)).parent
        root = Path(self.app.srcdir).parent
        for reference in list(self.document.findall(addnodes.pending_xref)):
            target = str(reference.get("reftarget", ""))
            if reference.get("reftype") != "myst" or not target or target.startswith("#"):
                continue
            if target in self.env.found_docs:  # a page whose name a folder beside this one has
                continue
            place = (here / target.partition("#")[0]).resolve()
            if not place.is_dir() or not place.is_relative_to(root):
                continue
            if place.with_name(place.name + ".md").is_file():  # a page beside a folder of its name
                continue
            path = str(place.relative_to(root))
            if REPOSITORY:
                words = reference.children[0].children
                new: nodes.Node = nodes.reference("", "", *words, refuri=f"{REPOSITORY}/{path}")
            else:
                new = nodes.inline("", "", *reference.children, classes=["place"])
            reference.replace_self(new)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_transform(Places)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
