"""The pages of the documentation, as text."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^(?P<fence>`{3,}|:{3,}) *(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=fence) *$", re.M | re.S)
# What a program wrote into a page, between its marks.
MADE = re.compile(r"<!-- (\w+) -->.*?<!-- /\1 -->", re.S)
