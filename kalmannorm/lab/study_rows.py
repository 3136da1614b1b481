"""The two files of a study's runs: a row a run in one, each run's curve in the other."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalmannorm.lab.results import csv_text, write_atomically

__all__ = [
    "CURVES", "MEASURED", "PLANNED", "RUNS", "Key", "Row", "Rows", "Table", "Told", "ToldRun", "key_of", "settings_of",
]  # fmt: skip

RUNS, CURVES = "runs.csv", "curves.csv"
# The searched settings are columns before the last two of the first, the scores between the two.
PLANNED = ("study", "arm", "label", "column", "kind", "seed", "chosen", "split")
MEASURED = ("last_loss", "steps", "scale", "seconds", "seconds_per_step", "error")

Row = dict[str, str]
# Of a run: its arm, kind and seed, and its searched settings.
Key = tuple[str, str, str, frozenset[tuple[str, str]]]
# A run's row, and those of its curve.
ToldRun = tuple[Row, list[Row]]
Told = dict[Key, ToldRun]


@dataclass
class Table:
    """A CSV file.

    Attributes:
        columns: In their order.
        rows: As text.
    """

    columns: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Table:
        """An empty one where there is no file."""
        if not path.is_file():
            return cls()
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            return cls(list(reader.fieldnames or ()), list(reader))

    def __add__(self, other: Table) -> Table:
        """The rows of both; a column that only the second has comes after the one that it comes after there."""
        columns = list(self.columns)
        for place, name in enumerate(other.columns):
            if name not in columns:
                columns.insert(columns.index(other.columns[place - 1]) + 1 if place else 0, name)
        return Table(columns, [*self.rows, *other.rows])

    def text(self, arms: Sequence[str]) -> str:
        """The file's: runs of the search, then those that count, each by arms in this order, and others last."""
        place = {arm: place for place, arm in enumerate(arms)}
        ordered = sorted(self.rows, key=lambda row: (row["kind"] != "search", place.get(row["arm"], len(place))))
        return csv_text(ordered, self.columns)


@dataclass
class Rows:
    """What the two files say.

    Attributes:
        runs: Those of ``runs.csv``.
        curves: Those of ``curves.csv``, of the same runs.
    """

    runs: Table = field(default_factory=Table)
    curves: Table = field(default_factory=Table)

    @classmethod
    def read(cls, folder: Path, scale: str) -> Rows:
        """A study's output; nothing of runs of another scale than this.

        Raises:
            ValueError: The files are of another scale, and nothing else is left of these runs: a study of this scale
                would write over them.
        """
        runs = Table.read(folder / RUNS)
        others = sorted({row.get("scale", "") for row in runs.rows} - {scale})
        if not others:
            return cls(runs, Table.read(folder / CURVES))
        for other in others:
            if not (folder / "runs" / other).is_dir():
                raise ValueError(
                    f"--output: {folder / RUNS} tells of runs of scale {other}, whose own folders are gone; got "
                    f"--scale {scale}, which would write over it: give another folder"
                )
        return cls()

    def without(self, arms: Collection[str]) -> Rows:
        """All but these arms' runs."""
        return Rows(*(
            Table(table.columns, [row for row in table.rows if row["arm"] not in arms])
            for table in (self.runs, self.curves)
        ))  # fmt: skip

    def among(self, keys: Collection[Key]) -> Rows:
        """The runs of these keys alone."""
        settings = settings_of(self.runs.columns)
        return Rows(*(
            Table(table.columns, [row for row in table.rows if key_of(row, settings) in keys])
            for table in (self.runs, self.curves)
        ))  # fmt: skip

    def __add__(self, other: Rows) -> Rows:
        """The runs of both."""
        return Rows(self.runs + other.runs, self.curves + other.curves)

    def told(self) -> Told:
        """Of each run that came to an end or diverged, its row and those of its curve."""
        settings = settings_of(self.runs.columns)
        found: Told = {key_of(row, settings): (row, []) for row in self.runs.rows if not row["error"] or _diverged(row)}
        for row in self.curves.rows:
            if (key := key_of(row, settings)) in found:
                found[key][1].append(row)
        return found

    def write(self, folder: Path, arms: Sequence[str]) -> None:
        """Both files, their arms in this order."""
        write_atomically(folder / RUNS, self.runs.text(arms))
        write_atomically(folder / CURVES, self.curves.text(arms))


def settings_of(columns: Sequence[str]) -> list[str]:
    """The searched settings among the columns of ``runs.csv``."""
    return list(columns[columns.index("seed") + 1 : columns.index("chosen")]) if "chosen" in columns else []


def _diverged(row: Row) -> bool:
    """It says so itself, or a module did."""
    return row["error"].startswith(("diverged: ", "FloatingPointError: "))


def key_of(row: Mapping[str, Any], settings: Sequence[str]) -> Key:
    """What a row's run is known by, with the columns of the searched settings."""
    given = frozenset((name, row[name]) for name in settings if row.get(name))
    return row["arm"], row["kind"], row["seed"], given
