"""An experiment's ``runs.csv``, with a row for each run, and ``curves.csv``, with the runs' curves."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kalmannorm.lab.results import ENVIRONMENT, csv_text, write_atomically

RUNS, CURVES = "runs.csv", "curves.csv"
# The columns of runs.csv: PLANNED, with the searched settings before its last two; the scores; MEASURED.
PLANNED = ("study", "arm", "label", "column", "kind", "seed", "chosen", "split")
MEASURED = ("last_loss", "steps", "scale", "seconds", "seconds_per_step", "error")
# How the error of a diverged run begins: as `jobs.divergence` writes it, or as a module raised it.
DIVERGED = ("diverged: ", "FloatingPointError: ")

Row = dict[str, str]
# A run's arm, kind and seed, and its searched settings.
Key = tuple[str, str, str, frozenset[tuple[str, str]]]
# A run's row, and the rows of its curve.
RecordedRun = tuple[Row, list[Row]]


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file, all cells as text; an empty table if there is no file."""
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else pd.DataFrame(dtype=str)
    except ValueError as error:  # pandas's errors too
        raise ValueError(f"{path} cannot be read as a table: {error}") from error


@dataclass(frozen=True)
class Records:
    """The content of the two files, as text.

    Attributes:
        runs: Each run's row, and the rows of its curve.
        settings: The searched settings of all runs.
    """

    runs: dict[Key, RecordedRun]
    settings: list[str]

    @property
    def rows(self) -> list[Row]:
        return [row for row, _ in self.runs.values()]

    @property
    def scores(self) -> list[str]:
        """The columns of scores."""
        known = {*PLANNED, *MEASURED, *ENVIRONMENT, *self.settings}
        return list(dict.fromkeys(name for row in self.rows for name in row if name not in known))

    @property
    def completed(self) -> dict[Key, RecordedRun]:
        """The runs that finished or diverged, without those that failed."""
        return {key: run for key, run in self.runs.items() if (run[0]["error"] or DIVERGED[0]).startswith(DIVERGED)}


def read(folder: Path) -> Records:
    """The records in an experiment's folder; empty if it has no files."""
    path = folder / RUNS
    runs, curves = read_table(path), read_table(folder / CURVES)
    absent = [name for name in (*PLANNED, *MEASURED) if name not in runs]
    if path.is_file() and (absent or runs.empty):
        raise ValueError(f"{path} is not a study's file of runs: it has no {', '.join(absent) or 'rows'}")
    names = list(runs.columns)
    settings = names[names.index("seed") + 1 : names.index("chosen")] if names else []
    found: dict[Key, RecordedRun] = {key_of(row, settings): (row, []) for row in runs.to_dict("records")}
    for row in curves.to_dict("records"):
        if (key := key_of(row, settings)) in found:
            found[key][1].append(row)
    return Records(found, settings)


def read_of_scale(folder: Path, scale: str, trained_in: Collection[str]) -> Records:
    """As `read`, but empty if the runs are of another scale; they were trained in the folders of these experiments.

    Raises:
        ValueError: The folders of runs of another scale are gone, so overwriting the files would lose these runs.
    """
    records = read(folder)
    # Rows without steps and error were computed, without a training.
    trained = [row for row, _ in records.completed.values() if row["steps"] or row["error"]]
    for other in sorted({row["scale"] for row in trained} - {scale}):
        patterns = [f"{name}/runs/{ending}" for name in trained_in for ending in (other, f"{other}-*-devices")]
        if not any(any(folder.parent.glob(pattern)) for pattern in patterns):
            raise ValueError(
                f"--output: {folder / RUNS} has runs of scale {other}, whose own folders are gone; got "
                f"--scale {scale}, which would write over it: give another folder"
            )
    return Records({}, []) if any(row["scale"] != scale for row in records.rows) else records


def write(folder: Path, records: Records, arms: Sequence[str]) -> None:
    """Write both files: search runs, then final runs, each in the order of ``arms``, other arms last."""
    place = {arm: place for place, arm in enumerate(arms)}
    curves = [row for _, curve in records.runs.values() for row in curve]
    of_runs = (*PLANNED[:-2], *records.settings, *PLANNED[-2:], *records.scores, *MEASURED)
    of_curves = ("arm", "kind", "seed", *records.settings, "step", "loss")
    for name, rows, columns in ((RUNS, records.rows, of_runs), (CURVES, curves, of_curves)):
        rows.sort(key=lambda row: (row["kind"] != "search", place.get(row["arm"], len(place))))
        write_atomically(folder / name, csv_text(rows, columns))


def key_of(row: Mapping[str, Any], settings: Sequence[str]) -> Key:
    """The key of a row's run, given the columns of searched settings."""
    given = frozenset((name, row[name]) for name in settings if row.get(name))
    return row["arm"], row["kind"], row["seed"], given
