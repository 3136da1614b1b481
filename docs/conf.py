"""How Sphinx builds the site: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import kalmannorm

project = "kalmannorm"
author = "The kalmannorm authors"
copyright = author
version = release = kalmannorm.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "places",  # the rest is in _ext
    "measured",
    "rule_table",
    "mathml",
    "docstrings",
    "deviations",
]
exclude_patterns = ["_build", "_ext", "**/.ipynb_checkpoints"]
nitpicky = True
# Of other projects, whose pages are not here: a build asks nothing of the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|dist|F|collections|typing|Any|Iterable|Iterator|Callable|Literal|Tensor)\b.*"),
    (r"py:.*", r"kalmannorm\..*\._[A-Z]"),  # type variables
]

# Pages that are run when the site is built (docs/notebooks) may not fail; all others are run by tests/test_docs.py.
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_execution_show_tb = True
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autoclass_content = "class"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False

html_theme = "pydata_sphinx_theme"
html_title = "kalmannorm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"
# A sidebar where there is a section to go through.
_ALONE = (
    "index", "start", "which-normalization", "how-it-works", "evidence", "reproduce", "api", "guide/troubleshooting",
    "compared", "glossary",
)  # fmt: skip
html_sidebars = {page: [] for page in _ALONE}
html_theme_options = {
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
}
# Prompts and output stay where they are when a block is copied.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
