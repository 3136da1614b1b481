"""Running an experiment: the same search for each arm, then trainings that count, and what they give."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
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
from kalmannorm.lab.fitting import ended_run
from kalmannorm.lab.formatting import as_markdown
from kalmannorm.lab.jobs import Job, divergence, run_jobs
from kalmannorm.lab.results import Result, alone, finished
from kalmannorm.lab.rows import Key, Row, Told, ToldRun, key_of
from kalmannorm.lab.training import quiet

WINDOWS = 50


@dataclass(frozen=True)
class Trial:
    """A training of an arm, and what came of it.

    Attributes:
        settings: Values of the searched ones.
        split: Which images it is scored on.
        row: Its row in ``runs.csv``; None where it has not come to an end.
        curve: Its rows in ``curves.csv``.
        failed: It raised something, and not because it diverged or because its data are not here.
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
    def own(self) -> Row:
        """What its rows have in both files."""
        settings = {setting: shown(value) for setting, value in self.settings.items()}
        return {"arm": self.arm.name, "kind": self.kind, "seed": str(self.seed), **settings}

    @property
    def key(self) -> Key:
        """What its rows are known by."""
        return key_of(self.own, [*self.settings])

    def told(self, told: Mapping[Key, ToldRun]) -> Self:
        """With what the files in the output folder tell of it."""
        row, curve = told.get(self.key, (None, []))
        return replace(self, row=row and row | _words(self.arm) | {"chosen": ""}, curve=curve)

    def merit(self, metric: str) -> tuple[float, float] | None:
        """By which the search's winner is found: the score, of equal ones the lower training loss; None without."""
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

    def runs(self, name: str = "") -> Path:
        """The folder of all runs of this scale, of this experiment or of another one."""
        ending = "" if self.devices == 1 else f"-{self.devices}-devices"
        return self.output / (name or self.experiment.name) / "runs" / f"{self.scale}{ending}"

    def length(self, kind: str) -> Scale:
        """How long a run is, as a share of the experiment's steps."""
        return self.amount if self.amount == "tiny" or kind == "final" else self.amount * self.experiment.search_scale


def run_experiment(whole: Experiment, plan: Plan) -> int:
    """Run an experiment, of arms that are chosen, where data are found; the exit code."""
    arms, trains = plan.experiment.arms, not plan.report and not plan.collect
    missing = _of_data(plan, missing_data) if trains else {}
    if trains and not plan.grow and all(missing.get(arm.name) for arm in arms):
        raise MissingDataError(missing[arms[0].name])
    _check_unchanged(plan)
    with ExitStack() as locks:
        for name in sorted({plan.experiment.name, *(arm.run[0] for arm in arms)}) if trains else ():
            locks.enter_context(alone(plan.output / name))
        trials = _told(whole, plan, missing) if trains or plan.collect else []
    plan.console.print(tables.write_table(whole, plan.folder), soft_wrap=True, highlight=False, markup=False)
    written = page.write_page(whole, plan.folder)
    plan.console.print(f"Report: {written}", soft_wrap=True, highlight=False, markup=False)
    return int(any(trial.failed for trial in trials))


def _told(whole: Experiment, plan: Plan, missing: Mapping[str, str]) -> list[Trial]:
    """The runs, collected or trained, once the files tell of them."""
    before = rows.read_of_scale(plan.folder, plan.scale)
    trusts = plan.grow or plan.collect
    told = before.ended if trusts else {}
    if plan.collect:
        trials = _collected(plan, told)
    else:
        _train_starts(plan)
        trials = _trained(plan, told, missing)
    asked = {trial.arm.name for trial in trials}
    runs = {key: run for key, run in before.runs.items() if run[0]["arm"] not in asked}
    runs |= {trial.key: (trial.row, trial.curve) for trial in trials if trial.row is not None}
    if trusts:
        runs |= _nowhere_else(before, trials, plan.runs())
    settings = dict.fromkeys([*(setting for trial in trials for setting in trial.settings), *before.settings])
    rows.write(plan.folder, Told(runs, list(settings)), [arm.name for arm in whole.arms])
    return trials


def _train_starts(plan: Plan) -> None:
    """Train what arms start from, if it is not there."""
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
    """The weights of an arm that another one starts from, on however many devices they were trained."""
    if plan.weights is not None and plan.weights.is_file():
        return plan.weights
    runs = (plan.weights or plan.output) / name / "runs"
    folders = [runs / plan.scale, *runs.glob(f"{plan.scale}-*-devices")]
    folders.sort(key=lambda folder: folder != plan.runs(name))
    places = (place for folder in folders for place in (folder / arm / "as-it-is").glob("*-seed-0"))
    return next((place / "last.ckpt" for place in places if finished(place)), None)


def _of_data(plan: Plan, ask: Callable[[Mapping[str, Any]], str]) -> dict[str, str]:
    """What is to be said of the data of each arm that is trained, asked once of equal data."""
    configs = {arm.name: arm.scaled(plan.amount) for arm in plan.experiment.arms if arm.analysis not in COMPUTED}
    answers = {key: ask(config) for key, config in {repr(c["data"]): c for c in configs.values()}.items()}
    return {name: answers[repr(config["data"])] for name, config in configs.items()}


def listed(plan: Plan) -> str:
    """What there is to do, a line an arm: runs, steps, hours on one device of this machine, and what is missing."""
    table = [["arm", "runs of the search", "runs that count", "steps a run", "steps", "hours", "data"]]
    counts: list[tuple[int, int, int, float]] = []  # of each arm the runs of both kinds, the steps and the seconds
    times: dict[str, float | None] = {}
    missing = _of_data(plan, partial(missing_data, download=False))
    notes = [f"- Data: {text}" for text in dict.fromkeys(missing.values()) if text]
    for arm in plan.experiment.arms:
        if arm.name not in missing:
            table.append([arm.name, "-", "-", "-", "-", "-", "needs none"])
            continue
        config, seeds = arm.scaled(plan.amount), plan.experiment.seeds
        each = int(config["trainer"]["max_steps"])
        searched = [arm.scaled(plan.length("search"), point)["trainer"]["max_steps"] for point in arm.points()]
        own = sum(searched) + each * seeds
        like = _like(config)
        if like not in times:
            times[like] = seconds_per_step(config)
        step = times[like]
        counts.append((len(searched), seeds, own, (step or 0.0) * own))
        there = "see below" if missing[arm.name] else "here"
        if (start := arm.start) and not _weights_of(plan, start.path.stem, start.arm):
            weights = f"{start.path.stem}/{start.arm}"
            notes.append(f"- {arm.name}: the weights of {weights} are missing, and trained first.")
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
        "An estimate, from a few training steps on random images: without loading data, validation and other work on "
        "this machine."
    )


def _like(config: Mapping[str, Any]) -> str:
    """What the time of a step depends on."""
    given, data = config["model"]["init_args"], config["data"].get("init_args", {})
    names = ("network", "normalization", "normalization_options", "statistics_batch")
    return repr([*(given.get(name) for name in names), *(data.get(name) for name in ("gradient_batch", "size"))])


def _trained(plan: Plan, told: Mapping[Key, ToldRun], missing: Mapping[str, str]) -> list[Trial]:
    """All runs, with what came of them, or with what is told of them from before."""
    quiet()
    asked, known = plan.experiment, {name for name, *_ in told}
    absent = {name: text for name, text in missing.items() if text and name not in known}
    if len(absent) == len(asked.arms):
        raise MissingDataError(absent[asked.arms[0].name])
    here = replace(asked, arms=tuple(arm for arm in asked.arms if arm.name in missing and arm.name not in absent))
    trials = _in_two(here, lambda trials: _run(plan, [trial.told(told) for trial in trials]))
    for arm in asked.arms:
        trial = Trial(arm, "final", {}, 0, asked.scored)
        if arm.name in absent:
            trials.append(replace(trial, row=_row(plan, trial, error=f"not run: {absent[arm.name]}")))
        elif arm.name not in missing:
            trials.append(replace(trial, row=_row(plan, trial, COMPUTED[arm.analysis](arm.scaled(plan.amount)))))
    return trials


def _check_unchanged(plan: Plan) -> None:
    """Refuse an experiment whose file was changed after a run of it, before anything is trained or written."""
    asked = plan.experiment
    for arm in asked.arms:
        search = [Trial(arm, "search", point, asked.search_seed, "validation") for point in arm.points()]
        trials = search or [Trial(arm, "final", {}, seed, asked.scored) for seed in range(asked.seeds)]
        for job in (_job(plan, trial) for trial in trials):
            if (job.folder / "config.yaml").is_file():
                check_same(job.folder, Run(job.config).complete())
                break  # the others of this arm differ in the searched settings and the seed alone


def _in_two(asked: Experiment, run: Callable[[list[Trial]], list[Trial]]) -> list[Trial]:
    """The runs of all arms' searches together, then those that count, by the settings that were best."""
    searched = run(
        [Trial(arm, "search", point, asked.search_seed, "validation") for arm in asked.arms for point in arm.points()]
    )
    finals = []
    for arm in asked.arms:
        own = [place for place, trial in enumerate(searched) if trial.arm is arm]
        merits = {place: merit for place in own if (merit := searched[place].merit(asked.metric)) is not None}
        settings: dict[str, Any] = {}
        if merits:
            best = max(merits, key=merits.__getitem__)
            winner = searched[best]
            searched[best], settings = replace(winner, row={**(winner.row or {}), "chosen": "yes"}), winner.settings
        if merits or not arm.search:
            finals += [Trial(arm, "final", settings, seed, asked.scored) for seed in range(asked.seeds)]
    return [*searched, *run(finals)]


def _collected(plan: Plan, told: Mapping[Key, ToldRun]) -> list[Trial]:
    """The runs that have ended, and those that are told of: of those that have not, with ``grow`` alone."""

    def ended(trials: list[Trial]) -> list[Trial]:
        known = []
        for trial in trials:
            job = _job(plan, trial)
            if (result := ended_run(job.config, job.folder, job.split)) is not None:
                known.append(_outcome(plan, trial, result))
            elif plan.grow or not job.folder.exists():
                known.append(trial.told(told))
        return [trial for trial in known if trial.row is not None]

    trials = _in_two(plan.experiment, ended)
    if not trials:
        raise ValueError(f"--output: no run of {plan.experiment.name} has ended in {plan.runs()}")
    return trials


def _nowhere_else(before: Told, trials: Sequence[Trial], runs: Path) -> dict[Key, ToldRun]:
    """What the files tell of other runs of these arms than these, and of which there is no folder."""
    arms, here = {trial.arm.name: trial.arm for trial in trials}, {trial.key for trial in trials}
    kept = {}
    for key, (row, curve) in before.runs.items():
        arm = arms.get(row["arm"])
        if arm is None or key in here:
            continue
        # In the order of the search, as the folder is named.
        given = {name: row[name] for name in dict.fromkeys([*arm.search, *before.settings]) if row.get(name)}
        if not _place(runs, arm.name, given, row["split"], row["seed"]).exists():
            kept[key] = (row | _words(arm) | {"chosen": ""}, curve)
    return kept


def _run(plan: Plan, trials: Sequence[Trial]) -> list[Trial]:
    """The trials with what came of them; those that are told of are not tried."""
    jobs = {place: _job(plan, trial) for place, trial in enumerate(trials)}
    jobs = {place: job for place, job in jobs.items() if trials[place].row is None or finished(job.folder)}
    # Two arms may be one training.
    each = {job.folder: job for job in jobs.values()}
    found: dict[Path, Result | Exception] = {folder: ended for folder, job in each.items() if (ended := _ended(job))}
    todo = [job for folder, job in each.items() if folder not in found]
    found |= zip((job.folder for job in todo), run_jobs(todo, plan.workers, plan.console), strict=True)
    return [
        _outcome(plan, trial, found[jobs[place].folder]) if place in jobs else trial
        for place, trial in enumerate(trials)
    ]


def _ended(job: Job) -> Result | None:
    """What has come of a job before: read here, as to start a process takes seconds."""
    with suppress(ValueError):  # which it raises in its turn
        return ended_run(job.config, job.folder, job.split)
    return None


def _job(plan: Plan, trial: Trial) -> Job:
    arm = trial.arm
    settings = [f"{setting.rpartition('.')[2]} {shown(value)}" for setting, value in trial.settings.items()]
    config = arm.scaled(plan.length(trial.kind), trial.settings, trial.seed)
    if start := arm.start:
        expected = _place(plan.runs(start.path.stem), start.arm, {}, start.scored, 0) / "last.ckpt"
        weights = _weights_of(plan, start.path.stem, start.arm) or expected
        config = merge(config, {"model": {"init_args": {"weights": str(weights)}}})
    if plan.devices > 1:
        config = merge(config, {"trainer": {"devices": plan.devices, "strategy": "ddp"}})
    experiment, name = arm.run
    folder = _place(plan.runs(experiment), name, trial.settings, trial.split, trial.seed)
    what = f"{plan.experiment.name}/{' '.join([arm.name, *settings])}"
    return Job(what, trial.seed, config, folder, trial.split, keep=trial.kind == "final")


def _place(runs: Path, arm: str, settings: Mapping[str, Any], split: str, seed: int | str) -> Path:
    """A run's folder; runs of other settings have other ones: a search may grow, and have another winner."""
    parts = ",".join(f"{setting}={shown(value)}" for setting, value in settings.items())
    return runs / arm / (re.sub(r"[^\w.=,+-]+", "-", parts) or "as-it-is") / f"{split}-seed-{seed}"


def _outcome(plan: Plan, trial: Trial, found: Result | Exception) -> Trial:
    """A trial with the rows of what came of it, and of what is computed after it."""
    if isinstance(found, Exception):
        # By which a module says that it diverged.
        diverged = isinstance(found, FloatingPointError)
        said = f"{type(found).__name__}: {' '.join(str(found).split())[:300]}"
        return replace(trial, row=_row(plan, trial, error=said), curve=[], failed=not diverged)
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


def _words(arm: Arm) -> Row:
    """Its place in the table, as the file of runs has it: one text, also where each metric has its own."""
    row, column = (each if isinstance(each, str) else " / ".join(each.values()) for each in (arm.label, arm.column))
    return {"label": row, "column": column}


def _row(plan: Plan, trial: Trial, numbers: Mapping[str, float] | None = None, error: str = "") -> Row:
    """A trial's row in the file of runs."""
    given = {"study": plan.experiment.name, "chosen": "", "split": trial.split, "scale": plan.scale, "error": error}
    return given | trial.own | _words(trial.arm) | _texts(numbers or {})


def _curve(trial: Trial, result: Result) -> list[Row]:
    """Its loss in windows, at each one's last step, and its validations."""
    losses = result.losses
    windows = min(WINDOWS, len(losses))
    edges = [len(losses) * place // windows for place in range(windows + 1)]
    points: dict[int, dict[str, float]] = {
        end: {"loss": sum(losses[start:end]) / (end - start)} for start, end in itertools.pairwise(edges)
    }
    for each in result.validations:
        points.setdefault(int(each["step"]), {}).update({k: v for k, v in each.items() if k != "step"})
    return [{**trial.own, "step": str(step), **_texts(points[step])} for step in sorted(points)]


def _texts(numbers: Mapping[str, float]) -> Row:
    return {name: f"{value:.6g}" for name, value in numbers.items()}
