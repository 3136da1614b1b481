"""An experiment's table and figure, from ``runs.csv`` and ``curves.csv`` alone."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import matplotlib as mpl
import pandas as pd

from kalmannorm.lab import figures
from kalmannorm.lab.experiments import Arm, Experiment
from kalmannorm.lab.formatting import as_markdown, format_value, is_share, two_digits
from kalmannorm.lab.rows import DIVERGED, RUNS, Row, read
from kalmannorm.lab.verdict import joined, verdict

# The keys of `results.environment` that the table's last note shows.
_SHOWN = ("commit", "torch", "machine", "accelerator", "date")


@dataclass(frozen=True)
class ArmRuns:
    """The rows of an arm.

    Attributes:
        label: Its row in the table, as ``column`` is its column.
        search: Rows of its search runs.
        final: Rows of its final runs with the chosen settings, failed and diverged ones included.
        curves: Rows of the curves of ``final``.
        arm: The arm in the experiment's file.
        reached: For each run that was as good as the baseline, the first step at which it was.
    """

    name: str
    label: str
    column: str
    search: list[Row]
    final: list[Row]
    curves: list[Row]
    arm: Arm
    reached: list[float] = field(default_factory=list)

    @property
    def counted(self) -> list[Row]:
        """The final runs that did not fail or diverge."""
        return [row for row in self.final if not row["error"]]

    @property
    def chosen(self) -> Row | None:
        return next((row for row in self.search if row["chosen"]), None)

    def values(self, score: str) -> list[float]:
        """A score of each counted run, in the unit shown."""
        if score == "steps_to_baseline":
            return self.reached
        return [(100 if is_share(score) else 1) * float(row[score]) for row in self.counted if row.get(score)]

    def text(self, score: str) -> str:
        """Mean and deviation of a score, with the number of runs if it is not that of all."""
        values = self.values(score)
        found = format_value(score, values)
        whole = len(values) == len(self.final) or score == "steps_to_baseline"
        return found if whole else f"{found} ({len(values)} of {len(self.final)} runs)"

    def points(self, name: str) -> pd.DataFrame:
        """The counted runs' losses or validation scores: columns ``seed``, ``step`` and ``name``."""
        seeds = [row["seed"] for row in self.counted]
        rows = (each for each in self.curves if each["seed"] in seeds and each.get(name))
        return pd.DataFrame([(each["seed"], int(each["step"]), float(each[name])) for each in rows],
                            columns=["seed", "step", name])  # fmt: skip

    def curve(self, name: str) -> pd.Series:
        """The loss, or a validation score, by step: the mean over the counted runs."""
        return self.points(name).groupby("step")[name].mean()


@dataclass(frozen=True)
class Runs:
    """An experiment's runs, by arm.

    Attributes:
        arms: In the experiment's order.
        settings: Names of the searched settings.
        scores: Names of the scores.
        rows: The rows of ``runs.csv`` of these arms.
        others: Names of arms in ``runs.csv`` that the experiment does not have.
    """

    arms: list[ArmRuns]
    settings: list[str]
    scores: list[str]
    rows: list[Row]
    others: list[str]

    @cached_property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(arm.column for arm in self.arms))

    def title(self, arm: ArmRuns) -> str:
        return f"{arm.label}, {arm.column}" if len(self.columns) > 1 else arm.label

    def short(self, setting: str) -> str:
        """A setting's last word, or its whole name if another setting ends in the same word."""
        last = setting.rpartition(".")[2]
        return last if sum(other.rpartition(".")[2] == last for other in self.settings) == 1 else setting

    def settings_text(self, row: Row) -> str:
        """A row's searched settings as text."""
        return ", ".join(f"{self.short(setting)} {row[setting]}" for setting in self.settings if row[setting])


def write_table(experiment: Experiment, folder: Path) -> str:
    """Write ``table.md`` and ``figure.svg`` to the folder of ``runs.csv``, and return the table.

    Text and the order of arms are from the experiment; numbers, arms and settings are from ``runs.csv``.
    """
    runs = read_runs(experiment, folder)
    text = "\n\n".join(part.strip("\n") for part in _sections(experiment, runs)) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    if not experiment.is_table:
        metric = experiment.metric.replace("_", " ")
        points: dict[str, dict[str, list[float]]] = {}
        for arm in runs.arms:
            points.setdefault(arm.label, {})[arm.column] = arm.values(experiment.metric)
        with mpl.rc_context({"svg.hashsalt": "kalmannorm", "svg.fonttype": "none"}):
            figures.arms(points, f"{metric}, %").savefig(folder / "figure.svg", metadata={"Date": None})
    return text


def read_runs(experiment: Experiment, folder: Path) -> Runs:
    records, path = read(folder), folder / RUNS
    if not records.runs:
        raise ValueError(f"--output: there is no {path} to report on")
    known = {arm.name: arm for arm in experiment.arms}
    found = dict.fromkeys(row["arm"] for row in records.rows)
    others = [name for name in found if name not in known]
    arms: dict[str, ArmRuns] = {}
    for name in (name for name in known if name in found):
        own = [run for run in records.runs.values() if run[0]["arm"] == name]
        search = [row for row, _ in own if row["kind"] == "search"]
        chosen: Row = next((row for row in search if row["chosen"]), {})
        # The file keeps final runs with settings that were chosen earlier.
        now = {setting: chosen.get(setting, "") for setting in records.settings}
        final = [run for run in own if run[0]["kind"] == "final" and now.items() <= run[0].items()]
        curves = [each for _, curve in final for each in curve]
        row = own[0][0]
        arms[name] = ArmRuns(name, row["label"], row["column"], search, [row for row, _ in final], curves, known[name])
    if not arms:
        raise ValueError(f"{path} has other arms than {experiment.source}: {', '.join(others)}")
    for arm in arms.values():
        baseline = arms.get(arm.arm.baseline)
        if baseline is not None:
            arm.reached.extend(_steps_to(baseline, arm, _metric(experiment, arm.arm)))
    rows = [row for row in records.rows if row["arm"] in known]
    return Runs([*arms.values()], records.settings, records.scores, rows, others)


def _metric(experiment: Experiment, arm: Arm) -> str:
    """An arm's main metric: the first that the paper reports, or the experiment's."""
    reported = (name for name in arm.reported if name != "steps_to_baseline")
    return next(reported, experiment.metric)


def _steps_to(baseline: ArmRuns, arm: ArmRuns, metric: str) -> list[float]:
    """The first step at which each run's validation score reaches the baseline's last one; runs that never do are
    left out.
    """
    goal, own = baseline.curve(metric), arm.points(metric)
    if goal.empty:
        return []
    good = own[own[metric] >= float(goal.iloc[-1])]
    return [float(step) for step in good.groupby("seed")["step"].min()]


def _sections(experiment: Experiment, runs: Runs) -> list[str]:
    parts = [f"# {experiment.title}", *([experiment.question] if experiment.question else [])]
    parts += [verdict_of(experiment, runs)] if experiment.verdict else []
    parts += [conditions(experiment, runs)]
    for title, grid in grids(experiment, runs):
        parts += [*([f"**{title}**"] if title else []), as_markdown(grid)]
    more = summary(experiment, runs)
    metric = experiment.metric.replace("_", " ")
    parts += [as_markdown(more)] if len(more) > 1 else []
    parts += [] if experiment.is_table else [f"![{metric}](figure.svg)"]
    return [*parts, "\n".join(f"- {note}" for note in notes(experiment, runs))]


def verdict_of(experiment: Experiment, runs: Runs) -> str:
    """The `verdict` on an experiment's runs, with the runs that failed or diverged."""
    groups = {runs.title(arm): arm.counted for arm in runs.arms if arm.counted}
    absent = [runs.title(arm) for arm in runs.arms if not arm.counted]
    without = f" Each run of {joined(absent)} failed or diverged." if absent else ""
    lost = [(runs.title(arm), len(arm.final) - len(arm.counted), len(arm.final)) for arm in runs.arms if arm.counted]
    parts = [f"{count} of {of} runs of {label}" for label, count, of in lost if count]
    without += f" Left out, as they failed or diverged: {joined(parts)}." if parts else ""
    if not groups:
        return without.strip()
    accuracies = {label: [float(row[experiment.metric]) for row in rows] for label, rows in groups.items()}
    times = {label: [float(row["seconds_per_step"]) for row in rows] for label, rows in groups.items()}
    seconds = {label: statistics.median(values) for label, values in times.items()}
    known = experiment.verdict
    return verdict(accuracies, seconds, known["guessing"], int(known["images"]), _split(experiment, runs)) + without


def conditions(experiment: Experiment, runs: Runs) -> str:
    """The runs' length, scored split and number of seeds, as text."""
    trained = [arm for arm in runs.arms if any(row["split"] and row["steps"] for row in arm.final)]
    counts = {len(arm.final) for arm in (trained if experiment.is_table else runs.arms) if arm.final} or {0}
    seeds = max(counts)
    several = f"{seeds}" if len(counts) == 1 else f"{min(counts)} to {seeds}"
    over = {0: "no final run", 1: "one seed"}.get(seeds, f"mean ± standard deviation over {several} seeds")
    scales = sorted({row["scale"] for row in runs.rows} - {"1"})
    if experiment.is_table:
        note = ["In brackets: the paper."] if any(arm.arm.reported for arm in runs.arms) else []
        if trained:
            how = f"Scaled down ({', '.join(scales)}): not comparable with the paper's" if scales else "The paper's"
            note = [f"{how} numbers of training steps; {over}.", *note]
        return " ".join(note)
    small = f"Scaled down ({', '.join(scales)}): these numbers only show that the study runs.\n\n" if scales else ""
    return f"{small}In per cent, on {_split(experiment, runs)} images; {over}."


def _split(experiment: Experiment, runs: Runs) -> str:
    """The split that the final runs were scored on."""
    return next((row["split"] for row in runs.rows if row["kind"] == "final"), experiment.scored)


def grids(experiment: Experiment, runs: Runs) -> list[tuple[str, list[list[str]]]]:
    """The tables with their titles: one laid out as in the paper, or one for each score."""
    if experiment.is_table:
        return [("", _grid(_cells(experiment, runs), experiment.rows))]
    scores = sorted(runs.scores, key=lambda name: name != experiment.metric) or [experiment.metric]
    if len(runs.columns) == 1:
        rows = [["", *(name.replace("_", " ") for name in scores)]]
        return [("", rows + [[arm.label, *(arm.text(score) for score in scores)] for arm in runs.arms])]
    places = {score: {(arm.label, arm.column): arm.text(score) for arm in runs.arms} for score in scores}
    return [(score.replace("_", " "), _grid(texts)) for score, texts in places.items()]


def _grid(texts: Mapping[tuple[str, str], str], order: Sequence[str] = ()) -> list[list[str]]:
    """A header and rows, from texts by row and column; rows are sorted by the prefixes in ``order``."""
    columns = list(dict.fromkeys(column for _, column in texts))
    rows = list(dict.fromkeys(row for row, _ in texts))
    places = {known: place for place, known in enumerate(order)}
    rows.sort(key=lambda row: next((places[known] for known in order if row.startswith(known)), len(order)))
    return [["", *columns], *([row, *(texts.get((row, column), "") for column in columns)] for row in rows)]


def _cells(experiment: Experiment, runs: Runs) -> dict[tuple[str, str], str]:
    """The measured numbers by row and column, the paper's in brackets."""
    texts: dict[tuple[str, str], str] = {}
    for arm in runs.arms:
        missing = "diverged" if any(row["error"].startswith(DIVERGED) for row in arm.final) else "-"
        for metric, row, column in arm.arm.places(_metric(experiment, arm.arm)):
            reported = arm.arm.reported.get(metric)
            measured = arm.text(metric) if arm.values(metric) else missing
            texts[row, column] = measured if reported is None else f"{measured} ({reported:,})"
    return texts


def summary(experiment: Experiment, runs: Runs) -> list[list[str]]:
    """A table with a header and a row for each arm: chosen settings, validation score, last loss and time."""
    metric = experiment.metric.replace("_", " ")
    header = ["arm", "seeds", "searched", "chosen", f"its {metric} in validation, %", "last loss", "ms a step"]
    arms = runs.arms
    if experiment.is_table:
        arms = [arm for arm in arms if any(row["last_loss"] for row in arm.counted)]
        scores = [score for score in runs.scores if score != "variance_gap"]
        header = ["arm", "seeds", *(f"{score.replace('_', ' ')}, %" for score in scores), "steps to the baseline's",
                  "last loss", "ms a step"]  # fmt: skip
    rows = [header]
    for arm in arms:
        best = arm.chosen
        settings = "as it is" if not arm.search else runs.settings_text(best) if best else "-"
        score = f"{100 * float(best[experiment.metric]):.2f}" if best and best.get(experiment.metric) else "-"
        last = format_value("ratio", [float(row["last_loss"]) for row in arm.counted if row["last_loss"]])
        times = [1000 * float(row["seconds_per_step"]) for row in arm.counted if row["seconds_per_step"]]
        speed = f"{math.fsum(times) / len(times):.1f}" if times else "-"
        middle = [str(len(arm.search)), settings, score]
        if experiment.is_table:
            middle = [format_value(score, arm.values(score)) for score in (*scores, "steps_to_baseline")]
        rows.append([arm.name, str(len(arm.final)), *middle, last, speed])
    return rows


def notes(experiment: Experiment, runs: Runs) -> list[str]:
    """Notes below the table: on arms, failed runs, the search, and where and when the runs were made."""
    found = []
    arm_notes = {arm.name: arm.note for arm in experiment.arms if arm.note}
    for arm in runs.arms:
        found += [f"{runs.title(arm)}: {arm_notes[arm.name]}"] if arm.name in arm_notes else []
        found += [*_edges(arm, runs), *_removed_from_search(arm, runs, experiment.metric)]
        if arm.search and not arm.chosen:
            found.append(f"{runs.title(arm)}: each run of the search failed or diverged, so there is no final run.")
    for row in runs.rows:
        if row["error"].startswith("not run: "):
            found.append(f"{row['arm']}, {row['error']}")
        elif row["error"]:
            settings = runs.settings_text(row)
            kind = "search" if row["kind"] == "search" else "run"
            place = ", ".join(part for part in (settings, f"seed {row['seed']}") if part)
            found.append(f"{row['arm']}, {kind} of {place}: {row['error']}")
    if runs.others:
        found.append(f"{RUNS} also has runs of {', '.join(runs.others)}, which {experiment.source} does not have.")
    sizes = {len(arm.search) for arm in runs.arms}
    if len(sizes) > 1:
        found.append("The searches are of different sizes: see the column of how many were searched.")
    if max(sizes) and experiment.search_scale != 1:
        found.append(f"A search run takes {experiment.search_scale:g} of the steps of a final run.")
    hours = sum(float(row["seconds"]) for row in runs.rows if row["seconds"]) / 3600
    environment = [f"{name} {' / '.join(values)}" for name in _SHOWN if (values := _values(runs, name))]
    searched = sum(len(arm.search) for arm in runs.arms)
    earlier = len(runs.rows) - searched - sum(len(arm.final) for arm in runs.arms)
    parts = ["1 run" if len(runs.rows) == 1 else f"{len(runs.rows)} runs"]
    parts += [f"{searched} of them of the search"] if searched else []
    parts += [f"{earlier} with settings that were chosen earlier, left out"] if earlier else []
    if any(row["seconds"] for row in runs.rows) or not experiment.is_table:
        place = f" {'; '.join(environment)}" if environment else ""
        found.append(f"{', '.join(parts)}, {two_digits(hours)} hours in all.{place}")
    return found


def _edges(arm: ArmRuns, runs: Runs) -> list[str]:
    """A note on each setting whose best value is the lowest or highest searched: a better one may lie beyond."""
    found = []
    for setting in runs.settings:
        try:
            tried = {float(row[setting]) for row in arm.search}
        except ValueError:  # not numbers
            continue
        if arm.chosen and len(tried) > 1:
            best, lowest, highest = float(arm.chosen[setting]), min(tried), max(tried)
            if best in (lowest, highest):
                found.append(
                    f"{runs.title(arm)}: the best {runs.short(setting)}, {best:g}, is at the end of those searched "
                    f"({lowest:g} to {highest:g})."
                )
    return found


def _removed_from_search(arm: ArmRuns, runs: Runs, metric: str) -> list[str]:
    """A note on each recorded search run that is better than the chosen one, but no longer in the search."""
    best = arm.chosen
    if best is None or not best.get(metric):
        return []
    ended = [row for row in arm.search if row[metric] and not row["error"]]
    better = [row for row in ended if float(row[metric]) > float(best[metric])]
    return [f"{runs.title(arm)}: {runs.settings_text(row)} was better, but is no longer searched." for row in better]


def _values(runs: Runs, name: str) -> Sequence[str]:
    values = list(dict.fromkeys(row[name] for row in runs.rows if row.get(name)))
    return [value[:7] + "-dirty" * value.endswith("-dirty") for value in values] if name == "commit" else values
