"""The two files of an experiment's runs: a row a run in one, each run's curve in the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kalmannorm.lab.results import ENVIRONMENT, csv_text, write_atomically

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


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file as text, of which nothing is taken for a number; an empty table where there is no file."""
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else pd.DataFrame(dtype=str)
    except ValueError as error:  # also what pandas's own errors are
        raise ValueError(f"{path} cannot be read as a table: {error}") from error


@dataclass(frozen=True)
class Told:
    """What the two files say, as text.

    Attributes:
        runs: Of each run its row, and the rows of its curve.
        settings: The searched settings of all.
    """

    runs: dict[Key, ToldRun]
    settings: list[str]

    @property
    def rows(self) -> list[Row]:
        return [row for row, _ in self.runs.values()]

    @property
    def scores(self) -> list[str]:
        """The columns that are neither settings nor what every run has."""
        known = {*PLANNED, *MEASURED, *ENVIRONMENT, *self.settings}
        return list(dict.fromkeys(name for row in self.rows for name in row if name not in known))

    @property
    def ended(self) -> dict[Key, ToldRun]:
        """The runs that came to an end or diverged, without those that failed."""
        return {key: run for key, run in self.runs.items() if (run[0]["error"] or DIVERGED[0]).startswith(DIVERGED)}


def read(folder: Path) -> Told:
    """An experiment's output; nothing where there is none."""
    path = folder / RUNS
    runs, curves = read_table(path), read_table(folder / CURVES)
    absent = [name for name in (*PLANNED, *MEASURED) if name not in runs]
    if path.is_file() and (absent or runs.empty):
        raise ValueError(f"{path} is not a study's file of runs: it has no {', '.join(absent) or 'rows'}")
    names = list(runs.columns)
    settings = names[names.index("seed") + 1 : names.index("chosen")] if names else []
    found: dict[Key, ToldRun] = {key_of(row, settings): (row, []) for row in runs.to_dict("records")}
    for row in curves.to_dict("records"):
        if (key := key_of(row, settings)) in found:
            found[key][1].append(row)
    return Told(found, settings)


def read_of_scale(folder: Path, scale: str) -> Told:
    """As `read`; nothing of runs of another scale than this, whose own folders must be there."""
    told = read(folder)
    others = sorted({row["scale"] for row in told.rows} - {scale})
    for other in others:
        if not any(folder.glob(f"runs/{other}")) and not any(folder.glob(f"runs/{other}-*-devices")):
            raise ValueError(
                f"--output: {folder / RUNS} tells of runs of scale {other}, whose own folders are gone; got "
                f"--scale {scale}, which would write over it: give another folder"
            )
    return Told({}, []) if others else told


def write(folder: Path, told: Told, arms: Sequence[str]) -> None:
    """Both files: runs of the search, then those that count, each by arms in this order, and others last."""
    place = {arm: place for place, arm in enumerate(arms)}
    curves = [row for _, curve in told.runs.values() for row in curve]
    of_runs = (*PLANNED[:-2], *told.settings, *PLANNED[-2:], *told.scores, *MEASURED)
    of_curves = ("arm", "kind", "seed", *told.settings, "step", "loss")
    for name, rows, columns in ((RUNS, told.rows, of_runs), (CURVES, curves, of_curves)):
        rows.sort(key=lambda row: (row["kind"] != "search", place.get(row["arm"], len(place))))
        write_atomically(folder / name, csv_text(rows, columns))


def key_of(row: Mapping[str, Any], settings: Sequence[str]) -> Key:
    """What a row's run is known by, with the columns of the searched settings."""
    given = frozenset((name, row[name]) for name in settings if row.get(name))
    return row["arm"], row["kind"], row["seed"], given
