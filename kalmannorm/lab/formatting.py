"""Numbers over seeds, tables and templates as text."""

import math
import statistics
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import jinja2

# Decimal places by the prefix of a metric's name; all other metrics are shares, shown in per cent.
DIGITS = {"steps": 0, "parameters": 2, "images_per_second": 2, "ratio": 3, "variance_gap": 3}


def is_share(metric: str) -> bool:
    return not metric.startswith(tuple(DIGITS))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (over ``n - 1``; 0 for a single value; nan if a value is not finite).

    Example:
        >>> mean_and_deviation([1.0, 3.0, 5.0]), mean_and_deviation([math.nan, 1.0])
        ((3.0, 2.0), (nan, nan))
    """
    # `statistics.stdev` raises an AttributeError for values that are not finite.
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def with_spread(values: Sequence[float], digits: int) -> str:
    """The mean, and with several values ± the standard deviation."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:,.{digits}f} ± {deviation:,.{digits}f}" if len(values) > 1 else f"{mean:,.{digits}f}"


def format_value(metric: str, values: Sequence[float]) -> str:
    """As `with_spread`, with the metric's decimal places; a dash without values."""
    digits = next((digits for name, digits in DIGITS.items() if metric.startswith(name)), 2)
    return with_spread(values, digits) if values else "-"


def two_digits(value: float) -> str:
    """A number with two significant digits, without an exponent.

    Example:
        >>> two_digits(12345.0), two_digits(99.6), two_digits(0.000056)
        ('12,000', '100', '0.000056')
    """
    return f"{Decimal(f'{value:.2g}'):,f}"


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the header."""
    rows = [[text.replace("|", r"\|") for text in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ([text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def filled(template: Path, **content: Any) -> str:
    """Fill in a template; in HTML, texts are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent), autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template(template.name).render(content)
