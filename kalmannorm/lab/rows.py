"""The two files of an experiment's runs: a row a run in one, each run's curve in the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from kalmannorm.lab.results import write_atomically

RUNS, CURVES = "runs.csv", "curves.csv"
# The searched settings are columns before the last two of the first, the scores between the two.
PLANNED = ("study", "arm", "label", "column", "kind", "seed", "chosen", "split")
MEASURED = ("last_loss", "steps", "scale", "seconds", "seconds_per_step", "error")
# How the error of a run that diverged begins: it says so itself, or a module did.
DIVERGED = ("diverged: ", "FloatingPointError: ")

Row = dict[str, str]
# Of a run: its arm, kind and seed, and its searched settings.
Key = tuple[str, str, str, frozenset[tuple[str, str]]]
# A run's row, and those of its curve.
ToldRun = tuple[Row, list[Row]]
Told = dict[Key, ToldRun]


def table(rows: Sequence[Row], columns: Sequence[str] = ()) -> pd.DataFrame:
    """Rows of text, without gaps: what a row has not is empty."""
    names = dict.fromkeys([*columns, *(name for row in rows for name in row)])
    return pd.DataFrame(rows, columns=list(names), dtype=str).fillna("")


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file as text, of which nothing is taken for a number; an empty table where there is no file."""
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else pd.DataFrame(dtype=str)
    except ValueError as error:  # also what pandas's own errors are
        raise ValueError(f"{path} cannot be read as a table: {error}") from error


def _together(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """The rows of both; a column that only the second has comes after the one that it comes after there."""
    columns = list(first.columns)
    for place, name in enumerate(second.columns):
        if name not in columns:
            columns.insert(columns.index(second.columns[place - 1]) + 1 if place else 0, name)
    return pd.concat([first, second]).reindex(columns=columns).fillna("")


@dataclass
class Rows:
    """What the two files say, as text.

    Attributes:
        runs: Those of ``runs.csv``.
        curves: Those of ``curves.csv``, of the same runs.
    """

    runs: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(dtype=str))
    curves: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(dtype=str))

    @classmethod
    def read(cls, folder: Path, scale: str) -> Rows:
        """An experiment's output; nothing of runs of another scale than this."""
        runs = read_table(folder / RUNS)
        others = sorted(set(runs.get("scale", ())) - {scale})
        if not others:
            return cls(runs, read_table(folder / CURVES))
        for other in others:
            if not any(folder.glob(f"runs/{other}")) and not any(folder.glob(f"runs/{other}-*-devices")):
                raise ValueError(
                    f"--output: {folder / RUNS} tells of runs of scale {other}, whose own folders are gone; got "
                    f"--scale {scale}, which would write over it: give another folder"
                )
        return cls()

    def without(self, arms: Collection[str]) -> Rows:
        return Rows(*(each if each.empty else each[~each["arm"].isin(arms)] for each in (self.runs, self.curves)))

    def __add__(self, other: Rows) -> Rows:
        return Rows(_together(self.runs, other.runs), _together(self.curves, other.curves))

    def told(self, *, failed: bool = False) -> Told:
        """Of each run that came to an end or diverged, or also of those that failed, its row and those of its curve."""
        settings = settings_of(self.runs.columns)
        found: Told = {}
        for row in self.runs.to_dict("records"):
            if failed or not row["error"] or row["error"].startswith(DIVERGED):
                found[key_of(row, settings)] = ({name: text for name, text in row.items() if text}, [])
        for row in self.curves.to_dict("records"):
            if (key := key_of(row, settings)) in found:
                found[key][1].append(row)
        return found

    def write(self, folder: Path, arms: Sequence[str]) -> None:
        """Both files: runs of the search, then those that count, each by arms in this order, and others last."""
        place = {arm: place for place, arm in enumerate(arms)}
        for name, each in ((RUNS, self.runs), (CURVES, self.curves)):
            if len(each):
                order = (each["kind"] != "search") * 10**6 + each["arm"].map(place).fillna(len(place))
                each = each.iloc[order.argsort(kind="stable")]
            write_atomically(folder / name, each.to_csv(index=False, lineterminator="\n"))


def settings_of(columns: Sequence[str]) -> list[str]:
    """The searched settings among the columns of either file."""
    names = list(columns)
    end = next((name for name in ("chosen", "step") if name in names), "")
    return names[names.index("seed") + 1 : names.index(end)] if end else []


def key_of(row: Mapping[str, Any], settings: Sequence[str]) -> Key:
    """What a row's run is known by, with the columns of the searched settings."""
    given = frozenset((name, row[name]) for name in settings if row.get(name))
    return row["arm"], row["kind"], row["seed"], given
