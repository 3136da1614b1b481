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
        runs: Of each run its row, without what is empty, and the rows of its curve.
        settings: The searched settings of all.
    """

    runs: dict[Key, ToldRun]
    settings: list[str]

    @property
    def ended(self) -> dict[Key, ToldRun]:
        """The runs that came to an end or diverged, without those that failed."""
        errors = {key: row.get("error", "") for key, (row, _) in self.runs.items()}
        return {key: self.runs[key] for key, error in errors.items() if not error or error.startswith(DIVERGED)}


def read(folder: Path, scale: str) -> Told:
    """An experiment's output; nothing of runs of another scale than this."""
    runs, curves = read_table(folder / RUNS), read_table(folder / CURVES)
    others = sorted(set(runs.get("scale", ())) - {scale})
    for other in others:
        if not any(folder.glob(f"runs/{other}")) and not any(folder.glob(f"runs/{other}-*-devices")):
            raise ValueError(
                f"--output: {folder / RUNS} tells of runs of scale {other}, whose own folders are gone; got "
                f"--scale {scale}, which would write over it: give another folder"
            )
    if others:
        return Told({}, [])
    settings = list(dict.fromkeys([*settings_of(runs.columns), *settings_of(curves.columns)]))
    found: dict[Key, ToldRun] = {}
    for row in runs.to_dict("records"):
        found[key_of(row, settings)] = ({name: text for name, text in row.items() if text}, [])
    for row in curves.to_dict("records"):
        if (key := key_of(row, settings)) in found:
            found[key][1].append(row)
    return Told(found, settings)


def write(folder: Path, told: Told, arms: Sequence[str]) -> None:
    """Both files: runs of the search, then those that count, each by arms in this order, and others last."""
    place = {arm: place for place, arm in enumerate(arms)}
    runs, curves = ([row for row, _ in told.runs.values()], [row for _, own in told.runs.values() for row in own])
    known = {*PLANNED, *MEASURED, *ENVIRONMENT, *told.settings}
    scores = dict.fromkeys(name for row in runs for name in row if name not in known)
    columns = (*PLANNED[:-2], *told.settings, *PLANNED[-2:], *scores, *MEASURED)
    of_curves = ("arm", "kind", "seed", *told.settings, "step", "loss")
    for name, rows, first in ((RUNS, runs, columns), (CURVES, curves, of_curves)):
        rows.sort(key=lambda row: (row["kind"] != "search", place.get(row["arm"], len(place))))
        write_atomically(folder / name, csv_text(rows, first))


def settings_of(columns: Sequence[str]) -> list[str]:
    """The searched settings among the columns of either file."""
    names = list(columns)
    end = next((name for name in ("chosen", "step") if name in names), "")
    return names[names.index("seed") + 1 : names.index(end)] if end else []


def key_of(row: Mapping[str, Any], settings: Sequence[str]) -> Key:
    """What a row's run is known by, with the columns of the searched settings."""
    given = frozenset((name, row[name]) for name in settings if row.get(name))
    return row["arm"], row["kind"], row["seed"], given
