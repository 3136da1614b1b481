"""Measured beside reported, in the layout of the paper's tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from kalmannorm.lab.recipes import CONFIGS, Recipe
from kalmannorm.lab.results import Result, csv_text

__all__ = [
    "Cell", "Layout", "as_csv", "as_markdown", "format_value", "grid", "layout", "mean_and_deviation",
    "steps_to_reach", "summary", "with_spread",
]  # fmt: skip

# Numbers after the point, by the beginning of a metric's name; what is none of these is a share, shown in per cent.
DIGITS = {"steps": 0, "parameters": 2, "images_per_second": 2, "ratio": 3, "variance_gap": 3}


@dataclass
class Cell:
    """A cell of a table, and what was measured for it.

    Attributes:
        recipe: What it is.
        config: What it was trained by: the recipe's, scaled.
        runs: The finished trainings, by seed.
        reached: By seed, the steps that a training took to be as good as the baseline's is at its end; None where it
            never was.
        computed: What was measured otherwise, by metric.
        problems: Why something is not there.
    """

    recipe: Recipe
    config: dict[str, Any]
    runs: dict[int, Result] = field(default_factory=dict)
    reached: dict[int, int | None] = field(default_factory=dict)
    computed: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """What counts most: the first that the paper reports, or the accuracy with running statistics."""
        reported = (name for name in self.recipe.cell.get("reported", {}) if name != "steps_to_baseline")
        return next(reported, "accuracy_running")

    def values(self, metric: str) -> list[float]:
        """A number a seed, in the unit that is shown."""
        if metric in self.computed:
            return [self.computed[metric]]
        if metric == "steps_to_baseline":
            return [step for step in self.reached.values() if step is not None]
        return [100 * run.scores[metric] for run in self.runs.values() if metric in run.scores]

    def places(self) -> Iterator[tuple[str, str, str]]:
        """Metric, row and column of each number that the table shows of it."""
        row, column = self.recipe.cell["row"], self.recipe.cell["column"]
        named = next((each for each in (row, column) if isinstance(each, Mapping)), {self.metric: ""})
        for metric in named:
            yield metric, *(each[metric] if isinstance(each, Mapping) else each for each in (row, column))


@dataclass(frozen=True)
class Layout:
    """Title, caption, and the order of rows and columns of a table."""

    title: str
    caption: str
    rows: list[str]
    columns: list[str]


def layout(table: str, cells: Sequence[Cell]) -> Layout:
    """A table's own, from its ``table.yaml``, without rows and columns that these cells have no place in."""
    path = CONFIGS / table / "table.yaml"
    given = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    places = [(row, column) for cell in cells for _, row, column in cell.places()]
    rows, columns = dict.fromkeys(row for row, _ in places), dict.fromkeys(column for _, column in places)

    def ordered(used: Mapping[str, None], order: Sequence[str]) -> list[str]:
        return [name for name in order if name in used] + [name for name in used if name not in order]

    return Layout(
        given.get("title", table),
        given.get("caption", ""),
        ordered(rows, given.get("rows", [])),
        ordered(columns, given.get("columns", [])),
    )


def steps_to_reach(result: Result, metric: str, goal: float) -> int | None:
    """The first validation's step at which a run's metric (0 to 1) was at least ``goal``; None if it never was."""
    return next((int(each["step"]) for each in result.validations if each.get(metric, -1.0) >= goal), None)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (over ``n - 1``; 0 of a single value); of values that are not finite, nan.

    Example:
        >>> mean_and_deviation([1.0, 3.0, 5.0]), mean_and_deviation([math.nan, 1.0])
        ((3.0, 2.0), (nan, nan))
    """
    # `statistics.stdev` ends in an AttributeError where one is not finite.
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def with_spread(values: Sequence[float], digits: int) -> str:
    """Mean, and the standard deviation over seeds if there are several."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:,.{digits}f} ± {deviation:,.{digits}f}" if len(values) > 1 else f"{mean:,.{digits}f}"


def format_value(metric: str, values: Sequence[float]) -> str:
    """As `with_spread`, in the digits of a metric; a dash without values."""
    digits = next((digits for name, digits in DIGITS.items() if metric.startswith(name)), 2)
    return with_spread(values, digits) if values else "-"


def grid(cells: Sequence[Cell], order: Layout) -> list[list[str]]:
    """The header and the rows: measured, and in brackets what the paper reports."""
    texts: dict[tuple[str, str], str] = {}
    for cell in cells:
        for metric, row, column in cell.places():
            reported = cell.recipe.cell.get("reported", {}).get(metric)
            measured = format_value(metric, cell.values(metric))
            texts[row, column] = measured if reported is None else f"{measured} ({reported:,})"
    body = [[row, *(texts.get((row, column), "") for column in order.columns)] for row in order.rows]
    return [["", *order.columns], *body]


def summary(cells: Sequence[Cell]) -> list[list[str]]:
    """A row a cell under a header, with all that was measured of its trainings."""
    trained = [cell for cell in cells if cell.runs]
    scores = list(dict.fromkeys(name for cell in trained for run in cell.runs.values() for name in run.scores))
    named = [f"{name.replace('_', ' ')}, %" for name in scores]
    rows = [["cell", "seeds", *named, "steps to the baseline's", "last loss", "ms a step"]]
    for cell in trained:
        runs = cell.runs.values()
        values = [format_value(name, cell.values(name)) for name in (*scores, "steps_to_baseline")]
        last = [run.last_loss for run in runs]
        speed = f"{1000 * statistics.fmean(run.seconds_per_step for run in runs):.1f}"
        rows.append([cell.recipe.name, str(len(runs)), *values, format_value("ratio", last), speed])
    return rows


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table with its header first, its columns aligned so that it can be read as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ([text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def as_csv(cells: Sequence[Cell], scale: str) -> str:
    """A line a run, and one for each cell without any; scores are shares, as the runs give them."""
    return csv_text([record for cell in cells for record in _records(cell, scale)])


def _records(cell: Cell, scale: str) -> Iterator[dict[str, Any]]:
    given = cell.config["model"].get("init_args", {})
    common = {
        "cell": cell.recipe.name,
        "run": cell.recipe.run,
        "normalization": given.get("normalization", "bn"),
        "statistics_batch": given.get("statistics_batch", ""),
        "gradient_batch": cell.config["data"].get("init_args", {}).get("gradient_batch", ""),
        "scale": scale,
        "steps": cell.config["trainer"]["max_steps"],
    }
    for seed, run in cell.runs.items():
        seconds = {"seconds": round(run.seconds, 3), "seconds_per_step": f"{run.seconds_per_step:.6g}"}
        scores = {name: f"{value:.6g}" for name, value in run.scores.items()}
        reached = {"steps_to_baseline": cell.reached[seed]} if cell.reached.get(seed) else {}
        yield {**common, "seed": seed, "status": "finished", **seconds, **scores, **reached}
    if cell.computed:
        computed = {name: f"{value:.6g}" for name, value in cell.computed.items()}
        yield {**common, "seed": "", "status": "computed", **computed}
    for problem in cell.problems:
        yield {**common, "seed": "", "status": "not run", "problem": problem}
