"""Running an experiment: the search of each arm, then its final runs, recorded in ``runs.csv`` and ``curves.csv``."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from rich.console import Console

from kalmannorm.lab import experiments, page, rows, tables
from kalmannorm.lab.analysis import measured_gap
from kalmannorm.lab.availability import missing_data
from kalmannorm.lab.configuration import Run, check_same
from kalmannorm.lab.costs import COMPUTED, seconds_per_step, where
from kalmannorm.lab.data.roots import MissingDataError
from kalmannorm.lab.experiments import Arm, Experiment, Scale, Split, merge, shown
from kalmannorm.lab.fitting import finished_result
from kalmannorm.lab.formatting import as_markdown
from kalmannorm.lab.jobs import Job, divergence, run_jobs
from kalmannorm.lab.results import Result, finished, locked
from kalmannorm.lab.rows import Key, RecordedRun, Records, Row, key_of
from kalmannorm.lab.training import quiet

WINDOWS = 50


@dataclass(frozen=True)
class Trial:
    """A training of an arm, and its outcome.

    Attributes:
        settings: Values of the searched settings.
        split: The split to score.
        row: Its row in ``runs.csv``; None if it has not finished.
        curve: Its rows in ``curves.csv``.
        failed: It raised an error other than divergence or missing data.
    """

    arm: Arm
    kind: Literal["search", "final"]
    settings: dict[str, Any]
    seed: int
    split: Split
    row: Row | None = None
    curve: list[Row] = field(default_factory=list)
    failed: bool = False

    @property
    def identity(self) -> Row:
        """The columns that identify it in both files."""
        settings = {setting: shown(value) for setting, value in self.settings.items()}
        return {"arm": self.arm.name, "kind": self.kind, "seed": str(self.seed), **settings}

    @property
    def key(self) -> Key:
        return key_of(self.identity, [*self.settings])

    def with_record(self, recorded: Mapping[Key, RecordedRun]) -> Self:
        """A copy with its recorded row and curve, if there are any."""
        row, curve = recorded.get(self.key, (None, []))
        return replace(self, row=row and row | _labels(self.arm) | {"chosen": ""}, curve=curve)

    def rank(self, metric: str) -> tuple[float, float] | None:
        """The search maximizes it: the score, then the negative training loss; None without a score."""
        if self.row is None or self.row.get("error") or not self.row.get(metric):
            return None
        return float(self.row[metric]), -float(self.row["last_loss"])


@dataclass(frozen=True)
class Plan:
    """How an experiment is run; see `kalmannorm.lab.run.run`."""

    experiment: Experiment
    amount: Scale
    output: Path
    devices: int
    workers: int | None
    weights: Path | None
    report: bool
    collect: bool
    grow: bool
    console: Console

    @property
    def folder(self) -> Path:
        return self.output / self.experiment.name

    @property
    def scale(self) -> str:
        return "tiny" if self.amount == "tiny" else f"{self.amount:g}"

    def runs(self, name: str) -> Path:
        """The folder of all runs of this scale of the experiment called ``name``."""
        ending = "" if self.devices == 1 else f"-{self.devices}-devices"
        return self.output / name / "runs" / f"{self.scale}{ending}"

    def length(self, kind: str) -> Scale:
        """A run's length, as a share of the experiment's steps."""
        return self.amount if self.amount == "tiny" or kind == "final" else self.amount * self.experiment.search_scale


def run_experiment(whole: Experiment, plan: Plan) -> int:
    """Run the plan's arms of an experiment, write its files, and return the exit code."""
    arms, trains = plan.experiment.arms, not plan.report and not plan.collect
    missing = _check_data(plan, missing_data) if trains else {}
    if trains and not plan.grow and all(missing.get(arm.name) for arm in arms):
        raise MissingDataError(missing[arms[0].name])
    _check_unchanged(plan)
    with ExitStack() as locks:
        for name in sorted({plan.experiment.name, *(arm.run[0] for arm in arms)}) if trains else ():
            locks.enter_context(locked(plan.output / name))
        trials = _record_trials(whole, plan, missing) if trains or plan.collect else []
    plan.console.print(tables.write_table(whole, plan.folder), soft_wrap=True, highlight=False, markup=False)
    written = page.write_page(whole, plan.folder)
    plan.console.print(f"Report: {written}", soft_wrap=True, highlight=False, markup=False)
    return int(any(trial.failed for trial in trials))


def _record_trials(whole: Experiment, plan: Plan, missing: Mapping[str, str]) -> list[Trial]:
    """Collect or train the runs, and write them to the files."""
    before = rows.read_of_scale(plan.folder, plan.scale, {whole.name, *(arm.run[0] for arm in whole.arms)})
    trusts_records = plan.grow or plan.collect
    recorded = before.completed if trusts_records else {}
    if plan.collect:
        trials = _search_then_finals(plan.experiment, lambda trials: _run(plan, trials, recorded))
        if not trials:
            raise ValueError(f"--output: no run of {plan.experiment.name} has finished in {plan.runs(whole.name)}")
    else:
        _train_starts(plan)
        trials = _train(plan, recorded, missing)
    names = {trial.arm.name for trial in trials}
    runs = {key: run for key, run in before.runs.items() if run[0]["arm"] not in names}
    runs |= {trial.key: (trial.row, trial.curve) for trial in trials if trial.row is not None}
    if trusts_records:
        runs |= _records_without_folder(before, trials, plan)
    settings = dict.fromkeys([*(setting for trial in trials for setting in trial.settings), *before.settings])
    rows.write(plan.folder, Records(runs, list(settings)), [arm.name for arm in whole.arms])
    return trials


def _train_starts(plan: Plan) -> None:
    """Train the weights that arms start from, if they are missing."""
    starts = dict.fromkeys(arm.start for arm in plan.experiment.arms if arm.start)
    for path in dict.fromkeys(start.path for start in starts):
        source = experiments.read(path)
        names = [start.arm for start in starts if start.path == path]
        own = replace(source, arms=tuple(arm for arm in source.arms if arm.name in names), seeds=1)
        first = replace(plan, experiment=own, grow=False)
        _check_unchanged(first)
        if absent := [arm for arm in own.arms if _weights_of(plan, path.stem, arm.name) is None]:
            run_experiment(source, replace(first, experiment=replace(own, arms=tuple(absent))))


def _weights_of(plan: Plan, name: str, arm: str) -> Path | None:
    """The trained weights of an arm, from any number of devices; None if there are none."""
    if plan.weights is not None and plan.weights.is_file():
        return plan.weights
    runs = (plan.weights or plan.output) / name / "runs"
    folders = [runs / plan.scale, *runs.glob(f"{plan.scale}-*-devices")]
    folders.sort(key=lambda folder: folder != plan.runs(name))
    places = (place for folder in folders for place in (folder / arm / "as-it-is").glob("*-seed-0"))
    return next((place / "last.ckpt" for place in places if finished(place)), None)


def _check_data(plan: Plan, check: Callable[[Mapping[str, Any]], str]) -> dict[str, str]:
    """The message of ``check`` for each arm that is trained; arms with equal data are checked once."""
    configs = {arm.name: arm.scaled(plan.amount) for arm in plan.experiment.arms if arm.analysis not in COMPUTED}
    answers = {key: check(config) for key, config in {repr(c["data"]): c for c in configs.values()}.items()}
    return {name: answers[repr(config["data"])] for name, config in configs.items()}


def listed(plan: Plan) -> str:
    """A table of the arms: runs, steps, estimated hours on one device of this machine, and missing data."""
    table = [["arm", "search runs", "final runs", "steps a run", "steps", "hours", "data"]]
    counts: list[tuple[int, int, int, float]] = []  # search runs, final runs, steps and seconds of each arm
    times: dict[str, float | None] = {}
    missing = _check_data(plan, partial(missing_data, download=False))
    notes = [f"- Data: {text}" for text in dict.fromkeys(missing.values()) if text]
    for arm in plan.experiment.arms:
        if arm.name not in missing:
            table.append([arm.name, "-", "-", "-", "-", "-", "needs none"])
            continue
        config, seeds = arm.scaled(plan.amount), plan.experiment.seeds
        each = int(config["trainer"]["max_steps"])
        searched = [arm.scaled(plan.length("search"), point)["trainer"]["max_steps"] for point in arm.points()]
        own = sum(searched) + each * seeds
        key = _timing_key(config)
        if key not in times:
            times[key] = seconds_per_step(config)
        step = times[key]
        counts.append((len(searched), seeds, own, (step or 0.0) * own))
        there = "see below" if missing[arm.name] else "here"
        if (start := arm.start) and not _weights_of(plan, start.path.stem, start.arm):
            weights = f"{start.path.stem}/{start.arm}"
            notes.append(f"- {arm.name}: the weights of {weights} are missing, and are trained first.")
            there += ", weights missing"
        hours = "?" if step is None else f"{step * own / 3600:,.2f}"
        table.append([arm.name, str(len(searched)), str(seeds), f"{each:,}", f"{own:,}", hours, there])
    text = f"{plan.experiment.title}\n\n{as_markdown(table)}"
    if not missing:
        return f"{text}\nNothing is trained."
    searches, finals, steps, seconds = map(sum, zip(*counts, strict=True))
    text += "".join(f"{note}\n" for note in ("", *notes)) if notes else ""
    known = f"{seconds / 3600:,.1f} hours" if None not in times.values() else "hours unknown where they are '?'"
    return (
        f"{text}\n{searches + finals} runs, {searches} of them of the search; {steps:,} steps; {known}, on {where()}. "
        "An estimate from a few training steps on random images, without data loading, validation and other load."
    )


def _timing_key(config: Mapping[str, Any]) -> str:
    """The settings that a step's time depends on."""
    given, data = config["model"]["init_args"], config["data"].get("init_args", {})
    names = ("network", "normalization", "normalization_options", "statistics_batch")
    return repr([*(given.get(name) for name in names), *(data.get(name) for name in ("gradient_batch", "size"))])


def _train(plan: Plan, recorded: Mapping[Key, RecordedRun], missing: Mapping[str, str]) -> list[Trial]:
    """Train all runs that are not recorded, and return all with their outcomes."""
    quiet()
    asked, known = plan.experiment, {name for name, *_ in recorded}
    absent = {name: text for name, text in missing.items() if text and name not in known}
    if len(absent) == len(asked.arms):
        raise MissingDataError(absent[asked.arms[0].name])
    here = replace(asked, arms=tuple(arm for arm in asked.arms if arm.name in missing and arm.name not in absent))
    trials = _search_then_finals(here, lambda trials: _run(plan, trials, recorded))
    for arm in asked.arms:
        trial = Trial(arm, "final", {}, 0, asked.scored)
        if arm.name in absent:
            trials.append(replace(trial, row=_row(plan, trial, error=f"not run: {absent[arm.name]}")))
        elif arm.name not in missing:
            trials.append(replace(trial, row=_row(plan, trial, COMPUTED[arm.analysis](arm.scaled(plan.amount)))))
    return trials


def _check_unchanged(plan: Plan) -> None:
    """Raise a ValueError if the experiment's file has changed since one of its runs."""
    asked = plan.experiment
    for arm in asked.arms:
        search = [Trial(arm, "search", point, asked.search_seed, "validation") for point in arm.points()]
        trials = search or [Trial(arm, "final", {}, seed, asked.scored) for seed in range(asked.seeds)]
        for job in (_job(plan, trial) for trial in trials):
            if (job.folder / "config.yaml").is_file():
                check_same(job.folder, Run(job.config).complete())
                break  # the arm's other runs differ only in the searched settings and the seed


def _search_then_finals(asked: Experiment, run: Callable[[list[Trial]], list[Trial]]) -> list[Trial]:
    """Run all arms' searches, then the final runs with each arm's best settings."""
    searched = run(
        [Trial(arm, "search", point, asked.search_seed, "validation") for arm in asked.arms for point in arm.points()]
    )
    finals = []
    for arm in asked.arms:
        own = [trial for trial in searched if trial.arm is arm and trial.rank(asked.metric)]
        best = max(own, key=lambda trial: trial.rank(asked.metric) or (), default=None)
        if best is not None and best.row is not None:
            best.row["chosen"] = "yes"
        if best is not None or not arm.search:
            settings = best.settings if best is not None else {}
            finals += [Trial(arm, "final", settings, seed, asked.scored) for seed in range(asked.seeds)]
    return [*searched, *run(finals)]


def _records_without_folder(before: Records, trials: Sequence[Trial], plan: Plan) -> dict[Key, RecordedRun]:
    """Recorded runs of these trials' arms, other than these trials, whose folders are gone."""
    arms, here = {trial.arm.name: trial.arm for trial in trials}, {trial.key for trial in trials}
    kept = {}
    for key, (row, curve) in before.runs.items():
        arm = arms.get(row["arm"])
        if arm is None or key in here:
            continue
        # The folder's name has the settings in the order of the search.
        given = {name: row[name] for name in dict.fromkeys([*arm.search, *before.settings]) if row.get(name)}
        experiment, name = arm.run
        if not _run_folder(plan.runs(experiment), name, given, row["split"], row["seed"]).exists():
            kept[key] = (row | _labels(arm) | {"chosen": ""}, curve)
    return kept


def _run(plan: Plan, trials: Sequence[Trial], recorded: Mapping[Key, RecordedRun]) -> list[Trial]:
    """Read the trials that have finished, train the others unless only to collect, and return those with a row."""
    jobs = [_job(plan, trial) for trial in trials]
    # By folder, because two arms may share one training.
    found: dict[Path, Result | Exception] = {}
    for job in jobs:
        try:
            if done := finished_result(job.config, job.folder, job.split):
                found[job.folder] = done
        except ValueError as error:
            found[job.folder] = error
    # A record is of a run whose folder is gone; with ``grow`` also of one whose folder holds an unfinished run.
    pairs = [
        (trial.with_record(recorded) if plan.grow or not job.folder.exists() else trial, job)
        for trial, job in zip(trials, jobs, strict=True)
    ]
    todo = {job.folder: job for trial, job in pairs if trial.row is None and job.folder not in found}
    if not plan.collect:
        found |= zip(todo, run_jobs([*todo.values()], plan.workers, plan.console), strict=True)
    ended = [_outcome(plan, trial, found[job.folder]) if job.folder in found else trial for trial, job in pairs]
    return [trial for trial in ended if trial.row is not None]


def _job(plan: Plan, trial: Trial) -> Job:
    arm = trial.arm
    settings = [f"{setting.rpartition('.')[2]} {shown(value)}" for setting, value in trial.settings.items()]
    config = arm.scaled(plan.length(trial.kind), trial.settings, trial.seed)
    if start := arm.start:
        expected = _run_folder(plan.runs(start.path.stem), start.arm, {}, start.scored, 0) / "last.ckpt"
        weights = _weights_of(plan, start.path.stem, start.arm) or expected
        config = merge(config, {"model": {"init_args": {"weights": str(weights)}}})
    if plan.devices > 1:
        config = merge(config, {"trainer": {"devices": plan.devices, "strategy": "ddp"}})
    experiment, name = arm.run
    folder = _run_folder(plan.runs(experiment), name, trial.settings, trial.split, trial.seed)
    return Job(" ".join([arm.name, *settings]), trial.seed, config, folder, trial.split, keep=trial.kind == "final")


def _run_folder(runs: Path, arm: str, settings: Mapping[str, Any], split: str, seed: int | str) -> Path:
    """A run's folder; its name has the settings, since a larger search may choose others."""
    parts = ",".join(f"{setting}={shown(value)}" for setting, value in settings.items())
    return runs / arm / (re.sub(r"[^\w.=,+-]+", "-", parts) or "as-it-is") / f"{split}-seed-{seed}"


def _outcome(plan: Plan, trial: Trial, found: Result | Exception) -> Trial:
    """A trial with its row and curve, and with the results of its analysis."""
    if isinstance(found, Exception):
        diverged = isinstance(found, FloatingPointError)
        text = f"{type(found).__name__}: {' '.join(str(found).split())[:300]}"
        return replace(trial, row=_row(plan, trial, error=text), curve=[], failed=not diverged)
    metric, error = plan.experiment.metric, divergence(found)
    missing = metric not in found.scores
    if missing:
        error = f"no score is called {metric!r}; there are {', '.join(found.scores)}"
    lengths = {"last_loss": found.last_loss, "seconds": found.seconds, "seconds_per_step": found.seconds_per_step}
    row = _row(plan, trial, found.scores | lengths, error) | {"steps": str(len(found.losses)), **found.environment}
    if trial.arm.analysis == "variance_gap" and trial.kind == "final" and not error:
        drawing = plan.folder / f"{page.GAPS}{trial.arm.name}.png" if trial.seed == 0 else None
        row["variance_gap"] = f"{measured_gap(_job(plan, trial).folder, drawing):.6g}"
    return replace(trial, row=row, curve=_curve(trial, found), failed=missing)


def _labels(arm: Arm) -> Row:
    """The arm's ``label`` and ``column`` in ``runs.csv``; those of several metrics are joined."""
    row, column = (each if isinstance(each, str) else " / ".join(each.values()) for each in (arm.label, arm.column))
    return {"label": row, "column": column}


def _row(plan: Plan, trial: Trial, numbers: Mapping[str, float] | None = None, error: str = "") -> Row:
    """A trial's row in ``runs.csv``."""
    given = {"study": plan.experiment.name, "chosen": "", "split": trial.split, "scale": plan.scale, "error": error}
    return given | trial.identity | _labels(trial.arm) | _texts(numbers or {})


def _curve(trial: Trial, result: Result) -> list[Row]:
    """A trial's rows in ``curves.csv``: the mean loss of each window of steps, and the validations."""
    losses = result.losses
    windows = min(WINDOWS, len(losses))
    edges = [len(losses) * place // windows for place in range(windows + 1)]
    points: dict[int, dict[str, float]] = {
        end: {"loss": sum(losses[start:end]) / (end - start)} for start, end in itertools.pairwise(edges)
    }
    for each in result.validations:
        points.setdefault(int(each["step"]), {}).update({k: v for k, v in each.items() if k != "step"})
    return [{**trial.identity, "step": str(step), **_texts(points[step])} for step in sorted(points)]


def _texts(numbers: Mapping[str, float]) -> Row:
    return {name: f"{value:.6g}" for name, value in numbers.items()}
