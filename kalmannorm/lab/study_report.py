"""A study's table and figure, from the file of its runs alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kalmannorm.lab import figures
from kalmannorm.lab.study_file import Study
from kalmannorm.lab.study_rows import MEASURED, PLANNED, RUNS, Row, Table, settings_of
from kalmannorm.lab.tables import as_markdown, format_value

__all__ = ["write_report"]

# Columns that follow, of `results.environment`, that a reader of the table is told.
_TOLD = ("commit", "torch", "machine", "accelerator", "date")


@dataclass(frozen=True)
class _Arm:
    """The rows of an arm; those that count are of the settings that were chosen, or of none where none were."""

    name: str
    label: str
    column: str
    search: list[Row]
    final: list[Row]

    @property
    def counted(self) -> list[Row]:
        """Of the runs that count, those that did not fail or diverge."""
        return [row for row in self.final if not row["error"]]

    @property
    def chosen(self) -> Row | None:
        return next((row for row in self.search if row["chosen"]), None)

    def values(self, score: str) -> list[float]:
        """A score of each run that counts, in per cent."""
        return [100 * float(row[score]) for row in self.counted if row.get(score)]

    def text(self, score: str) -> str:
        """Mean and deviation of a score, in per cent, and of how many runs if not of all."""
        values = self.values(score)
        found = format_value(score, values)
        return found if len(values) == len(self.final) else f"{found} ({len(values)} of {len(self.final)} runs)"


@dataclass(frozen=True)
class _Runs:
    """All that the file says."""

    arms: list[_Arm]
    settings: list[str]
    scores: list[str]
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(arm.column for arm in self.arms))

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(arm.label for arm in self.arms))

    def at(self, label: str, column: str) -> _Arm | None:
        return next((arm for arm in self.arms if (arm.label, arm.column) == (label, column)), None)

    def title(self, arm: _Arm) -> str:
        """Where an arm is in the table."""
        return f"{arm.label}, {arm.column}" if len(self.columns) > 1 else arm.label

    def short(self, setting: str) -> str:
        """A setting's last word, if no other has the same."""
        last = setting.rpartition(".")[2]
        return last if sum(other.rpartition(".")[2] == last for other in self.settings) == 1 else setting

    def said(self, row: Row) -> str:
        """A row's searched settings in words."""
        return ", ".join(f"{self.short(setting)} {row[setting]}" for setting in self.settings if row[setting])


def write_report(study: Study, folder: Path) -> str:
    """Write ``table.md`` and ``figure.svg`` beside a study's ``runs.csv``; the same file gives the same two.

    Args:
        study: For its words and the order of its arms; the numbers, arms and settings are those of the file.
        folder: With the file.

    Returns:
        The table.

    Raises:
        ValueError: There is no such file, or it is not of a study's runs.
    """
    runs = _read(folder / RUNS, [arm.name for arm in study.arms])
    text = _table(study, runs)
    (folder / "table.md").write_text(text, encoding="utf-8")
    import matplotlib as mpl  # noqa: PLC0415 - slow

    metric = study.metric.replace("_", " ")
    points = {
        label: {arm.column: arm.values(study.metric) for arm in runs.arms if arm.label == label}
        for label in runs.labels
    }
    with mpl.rc_context({"svg.hashsalt": "kalmannorm", "svg.fonttype": "none"}):
        figures.arms(points, f"{metric}, %").savefig(folder / "figure.svg", metadata={"Date": None})
    return text


def _read(path: Path, order: Sequence[str]) -> _Runs:
    if not path.is_file():
        raise ValueError(f"--output: there is no {path} to report on")
    table = Table.read(path)
    header, rows = table.columns, table.rows
    absent = [name for name in (*PLANNED, *MEASURED) if name not in header]
    if absent or not rows:
        raise ValueError(f"{path} is not a study's file of runs: it has no {', '.join(absent) or 'rows'}")
    settings = settings_of(header)
    scores = header[header.index("split") + 1 : header.index("last_loss")]
    arms = []
    # Those of the study in its order, then what else the file has.
    found = dict.fromkeys(row["arm"] for row in rows)
    for name in [*(arm for arm in order if arm in found), *(arm for arm in found if arm not in order)]:
        own = [row for row in rows if row["arm"] == name]
        search, final = ([row for row in own if row["kind"] == kind] for kind in ("search", "final"))
        chosen = next((row for row in search if row["chosen"]), {})
        # Those of an earlier choice stay in the file.
        final = [row for row in final if all(row[setting] == chosen.get(setting, "") for setting in settings)]
        arms.append(_Arm(name, own[0]["label"], own[0]["column"], search, final))
    return _Runs(arms, settings, scores, rows)


def _table(study: Study, runs: _Runs) -> str:
    counts = {len(arm.final) for arm in runs.arms if arm.final} or {0}
    seeds = max(counts)
    split = next((row["split"] for row in runs.rows if row["kind"] == "final"), study.scored)
    several = f"{seeds}" if len(counts) == 1 else f"{min(counts)} to {seeds}"
    over = {0: "no run counts", 1: "one seed"}.get(seeds, f"mean ± standard deviation over {several} seeds")
    scales = sorted({row["scale"] for row in runs.rows} - {"1"})
    parts = [f"# {study.title}", study.question]
    if scales:
        parts.append(f"Scaled down ({', '.join(scales)}): these numbers only show that the study runs.")
    parts.append(f"In per cent, on {split} images; {over}.")
    scores = sorted(runs.scores, key=lambda name: name != study.metric) or [study.metric]
    if len(runs.columns) == 1:
        rows = [["", *(name.replace("_", " ") for name in scores)]]
        rows += [[arm.label, *(arm.text(score) for score in scores)] for arm in runs.arms]
        parts.append(as_markdown(rows))
    else:
        for score in scores:
            parts += [f"**{score.replace('_', ' ')}**", as_markdown(_grid(runs, score))]
    parts += [_chosen(study, runs), f"![{study.metric.replace('_', ' ')}](figure.svg)", _notes(study, runs)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _grid(runs: _Runs, score: str) -> list[list[str]]:
    found = [[runs.at(label, column) for column in runs.columns] for label in runs.labels]
    body = [[arm.text(score) if arm else "" for arm in row] for row in found]
    return [["", *runs.columns], *([label, *row] for label, row in zip(runs.labels, body, strict=True))]


def _chosen(study: Study, runs: _Runs) -> str:
    """What each arm was trained with, and how its training went."""
    metric = study.metric.replace("_", " ")
    rows = [["arm", "seeds", "searched", "chosen", f"its {metric} in validation, %", "last loss", "ms a step"]]
    for arm in runs.arms:
        best = arm.chosen
        settings = "as it is" if not arm.search else runs.said(best) if best else "-"
        score = f"{100 * float(best[study.metric]):.2f}" if best and best.get(study.metric) else "-"
        last = format_value("ratio", [float(row["last_loss"]) for row in arm.counted])
        times = [1000 * float(row["seconds_per_step"]) for row in arm.counted]
        speed = f"{math.fsum(times) / len(times):.1f}" if times else "-"
        rows.append([arm.name, str(len(arm.final)), str(len(arm.search)), settings, score, last, speed])
    return as_markdown(rows)


def _notes(study: Study, runs: _Runs) -> str:
    notes = []
    words = {arm.name: arm.note for arm in study.arms if arm.note}
    for arm in runs.arms:
        notes += [f"{runs.title(arm)}: {words[arm.name]}"] if arm.name in words else []
        notes += [*_edges(arm, runs), *_better(arm, runs, study.metric)]
        if arm.search and not arm.chosen:
            notes.append(f"{runs.title(arm)}: no run of the search came to an end, so none was trained that counts.")
    for row in runs.rows:
        if row["error"]:
            settings = runs.said(row)
            what = "search" if row["kind"] == "search" else "run"
            place = ", ".join(part for part in (settings, f"seed {row['seed']}") if part)
            notes.append(f"{row['arm']}, {what} of {place}: {row['error']}")
    sizes = {len(arm.search) for arm in runs.arms}
    if len(sizes) > 1:
        notes.append("The searches are of different sizes: see the column of how many were searched.")
    if max(sizes) and study.search_scale != 1:
        notes.append(f"A run of the search takes {study.search_scale:g} of the steps of one that counts.")
    hours = sum(float(row["seconds"]) for row in runs.rows if row["seconds"]) / 3600
    told = [f"{name} {' / '.join(values)}" for name in _TOLD if (values := _values(runs, name))]
    searched = sum(len(arm.search) for arm in runs.arms)
    earlier = len(runs.rows) - searched - sum(len(arm.final) for arm in runs.arms)
    parts = ["1 run" if len(runs.rows) == 1 else f"{len(runs.rows)} runs"]
    parts += [f"{searched} of them of the search"] if searched else []
    parts += [f"{earlier} of settings that were chosen before and do not count"] if earlier else []
    notes.append(f"{', '.join(parts)}, {hours:.2g} hours in all.{' ' * bool(told)}{'; '.join(told)}")
    return "\n".join(f"- {note}" for note in notes)


def _edges(arm: _Arm, runs: _Runs) -> list[str]:
    """Where the best value is the lowest or the highest of those tried: a better one may lie beyond."""
    notes = []
    for setting in runs.settings:
        tried = {row[setting] for row in arm.search}
        numbers = _numbers(tried)
        if arm.chosen and len(numbers) > 1:
            best = float(arm.chosen[setting])
            if best in (min(numbers), max(numbers)):
                notes.append(
                    f"{runs.title(arm)}: the best {runs.short(setting)}, {best:g}, is at the end of those searched "
                    f"({min(numbers):g} to {max(numbers):g})."
                )
    return notes


def _better(arm: _Arm, runs: _Runs, metric: str) -> list[str]:
    """What would have been chosen if it had still been among the values to try."""
    best = arm.chosen
    if best is None or not best.get(metric):
        return []
    ended = [row for row in arm.search if row[metric] and not row["error"]]
    better = [row for row in ended if float(row[metric]) > float(best[metric])]
    return [f"{runs.title(arm)}: {runs.said(row)} was better, but is no longer searched." for row in better]


def _numbers(texts: set[str]) -> list[float]:
    """The numbers that texts are; nothing where one is none."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return []


def _values(runs: _Runs, name: str) -> Sequence[str]:
    values = list(dict.fromkeys(row[name] for row in runs.rows if row.get(name)))
    return [value[:7] for value in values] if name == "commit" else values
