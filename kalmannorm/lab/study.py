"""A question asked by an experiment: the same search for each arm, then trainings that count."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from kalmannorm.lab import study_file
from kalmannorm.lab.availability import data_at, with_data
from kalmannorm.lab.data.roots import MissingDataError
from kalmannorm.lab.recipes import Scale, merge
from kalmannorm.lab.reproduce import checked
from kalmannorm.lab.results import Result, finished
from kalmannorm.lab.study_file import Arm, Study, shown
from kalmannorm.lab.study_report import write_report
from kalmannorm.lab.study_rows import MEASURED, PLANNED, Key, Row, Rows, Table, Told, ToldRun, key_of, settings_of
from kalmannorm.lab.tables import Cell, as_markdown
from kalmannorm.lab.training import quiet
from kalmannorm.lab.trainings import Job, divergence, reason, run_jobs

if TYPE_CHECKING:
    from kalmannorm.lab.fitting import Split

__all__ = ["Trial", "study"]

WINDOWS = 50


@dataclass(frozen=True)
class Trial:
    """A training of an arm, and what came of it.

    Attributes:
        arm: What is trained.
        kind: Of the search, or one of those that count.
        settings: Of the searched ones.
        seed: Of weights and order.
        split: Which images it is scored on.
        result: If it came to an end.
        error: Why it does not count: what it raised, or how it diverged; empty where it does.
        failed: It raised something, and not because it diverged.
        chosen: Its settings won the search.
        told: In place of a result, what the files in the output folder tell of it: its row, and those of its curve.
    """

    arm: Arm
    kind: Literal["search", "final"]
    settings: dict[str, Any]
    seed: int
    split: Split
    result: Result | None = None
    error: str = ""
    failed: bool = False
    chosen: bool = False
    told: ToldRun | None = None

    @property
    def key(self) -> Key:
        """What its rows are known by."""
        settings = frozenset((setting, shown(value)) for setting, value in self.settings.items())
        return self.arm.name, self.kind, str(self.seed), settings

    def merit(self, metric: str) -> tuple[float, float] | None:
        """By which the search's winner is found: the score, of equal ones the lower training loss; None without."""
        if self.told is not None:
            row = self.told[0]
            return (float(row[metric]), -float(row["last_loss"])) if row.get(metric) and not row["error"] else None
        if self.result is None or self.error:
            return None
        return self.result.scores[metric], -self.result.last_loss


def study(
    name: str,
    *,
    only: str = "*",
    scale: str = "1",
    data: Path | None = None,
    seeds: int | None = None,
    workers: int | None = None,
    output: Path = Path("runs/study"),
    list: bool = False,
    report: bool = False,
    collect: bool = False,
    grow: bool = False,
) -> int:
    """Search hyper-parameters for each arm of an experiment alike, train each from several seeds, and compare.

    What is finished is not trained again, and what was interrupted goes on where it was. The files of runs and curves
    keep what they say of arms that were not asked for. Where arms start from another study's weights, these are
    trained first, in the same output folder.

    Args:
        name: Such as batch-sizes-cpu, or a YAML file; anything else lists what there is.
        only: The arms to run, as a pattern or several: 'kn-*,bn-2'.
        scale: A share of the study's training steps, or tiny: seconds a run, on generated images.
        data: The folder with the data sets, in place of the one that KALMANNORM_DATA names.
        seeds: Trainings of each arm that count, with seeds 0, 1, ..., if not as many as the study says.
        workers: Trainings at the same time, by default as many as there are GPUs, or else CPUs.
        output: Folder for the runs and the tables.
        list: Only say how many runs and steps there are.
        report: Only make the table and the figure again, from the study's runs.csv in the output folder.
        collect: Train nothing: tell what has come to an end in the output folder, as of a study that was interrupted or
            that ran elsewhere, and what its runs.csv tells of runs whose own folders are gone.
        grow: Believe what the output folder's runs.csv tells of runs whose own folders are gone, as where only that
            file was kept, and train what it does not tell of: new values of a search, more seeds. Nobody can check that
            these runs were of the same configuration.

    Returns:
        The exit code: 1 where a run failed. One that diverged is a result.
    """
    amount = checked(scale, workers=workers, seeds=seeds)
    whole = study_file.read(name)
    asked = replace(whole, arms=_chosen(whole, only), seeds=seeds or whole.seeds)
    study_file.check_search_seed("--seeds", asked)
    folder = output / asked.name
    console = Console()
    trials: Sequence[Trial] = ()
    if list:
        print(_listed(asked, amount))
        return 0
    label = "tiny" if amount == "tiny" else f"{amount:g}"
    before = Rows() if report else Rows.read(folder, label)
    told = before.told() if grow or collect else {}
    if collect:
        trials = _collected(asked, amount, folder, told, grow)
    elif not report:
        for path, arms in _starts(asked).items():
            study(str(path), only=",".join(arms), scale=scale, data=data, seeds=1, workers=workers, output=output)
        trials = _trained(asked, amount, data, output, workers, console, told)
    if not report:
        others = before.without({trial.arm.name for trial in trials})
        rows = others + Rows(_runs_table(asked, trials, label), _curves_table(trials))
        if grow or collect:
            rows += _nowhere_else(before, trials, _runs(folder, amount))
        rows.write(folder, [arm.name for arm in whole.arms])
    console.print(write_report(whole, folder), soft_wrap=True, highlight=False, markup=False)
    console.print(f"Files: {folder}", soft_wrap=True, highlight=False, markup=False)
    return int(any(trial.failed for trial in trials))


def _chosen(asked: Study, only: str) -> tuple[Arm, ...]:
    patterns = only.split(",")
    chosen = tuple(arm for arm in asked.arms if any(fnmatch(arm.name, pattern) for pattern in patterns))
    if not chosen:
        arms = ", ".join(arm.name for arm in asked.arms)
        raise ValueError(f"--only: no arm of {asked.name} is called {only!r}; there are {arms}")
    return chosen


def _starts(asked: Study) -> dict[Path, list[str]]:
    """The studies that arms start from, and which of their arms."""
    found: dict[Path, list[str]] = {}
    for start in dict.fromkeys(arm.start for arm in asked.arms if arm.start):
        found.setdefault(start.path, []).append(start.arm)
    return found


def _listed(asked: Study, amount: Scale) -> str:
    rows = [["arm", "runs of the search", "runs that count", "steps a run", "steps"]]
    total = [0, 0, 0]
    for arm in asked.arms:
        points = arm.points()
        each = int(arm.recipe.scaled(amount)["trainer"]["max_steps"])
        share = _length(asked, "search", amount)
        searched = [int(arm.config(share, point, 0)["trainer"]["max_steps"]) for point in points]
        numbers = (len(points), asked.seeds, sum(searched) + each * asked.seeds)
        total = [before + number for before, number in zip(total, numbers, strict=True)]
        rows.append([arm.name, str(numbers[0]), str(numbers[1]), f"{each:,}", f"{numbers[2]:,}"])
    first = [f" Before them, those of {path.stem}: {', '.join(arms)}." for path, arms in _starts(asked).items()]
    return (
        f"{asked.title}\n\n{as_markdown(rows)}\n{total[0] + total[1]} runs, {total[0]} of them of the search; "
        f"{total[2]:,} steps.{''.join(first)}"
    )


def _trained(
    asked: Study, amount: Scale, data: Path | None, output: Path, workers: int | None, console: Console, told: Told
) -> list[Trial]:
    """All runs, with what came of them, or with what is told of them from before."""
    cells = [Cell(arm.recipe, arm.recipe.scaled(amount)) for arm in asked.arms]
    folder = output / asked.name
    quiet()
    with data_at(data, cells, output, amount):
        with_data(cells)
        absent = {arm.name: cell.problems[0] for arm, cell in zip(asked.arms, cells, strict=True) if cell.problems}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output: cannot make the folder {folder}: {error.strerror}") from error

        def run(trials: list[Trial]) -> list[Trial]:
            known = [replace(trial, told=told.get(trial.key)) for trial in trials]
            return _run(asked, known, amount, folder, absent, workers, console)

        return _in_two(asked, run)


def _in_two(asked: Study, run: Callable[[list[Trial]], list[Trial]]) -> list[Trial]:
    """The runs of all arms' searches together, then those that count, by the settings that were best."""
    searched = run(
        [Trial(arm, "search", point, asked.search_seed, "validation") for arm in asked.arms for point in arm.points()]
    )
    finals = []
    for arm in asked.arms:
        own = [place for place, trial in enumerate(searched) if trial.arm is arm]
        best = _best([searched[place] for place in own], asked.metric) if own else None
        if best is not None:
            searched[own[best]] = replace(searched[own[best]], chosen=True)
        if best is not None or not arm.search:
            settings = searched[own[best]].settings if best is not None else {}
            finals += [Trial(arm, "final", settings, seed, asked.scored) for seed in range(asked.seeds)]
    return [*searched, *run(finals)]


def _collected(asked: Study, amount: Scale, folder: Path, told: Told, grow: bool) -> list[Trial]:
    """The runs that have ended, and those that are told of: of those that have not, with `grow` alone."""

    def ended(trials: list[Trial]) -> list[Trial]:
        from kalmannorm.lab.fitting import ended_run  # noqa: PLC0415 - slow

        jobs = [_job(asked, trial, amount, _runs(folder, amount)) for trial in trials]
        found = [ended_run(job.config, job.folder, job.split) for job in jobs]
        known = [
            _outcome(trial, result, asked)
            if result
            else replace(trial, told=told.get(trial.key) if grow or not job.folder.exists() else None)
            for trial, job, result in zip(trials, jobs, found, strict=True)
        ]
        return [trial for trial in known if trial.result or trial.told]

    trials = _in_two(asked, ended)
    if not trials:
        raise ValueError(f"--output: no run of {asked.name} has ended in {_runs(folder, amount)}")
    return trials


def _nowhere_else(before: Rows, trials: Sequence[Trial], runs: Path) -> Rows:
    """What the files tell of other runs of these arms than these, and of which there is no folder."""
    arms = {trial.arm.name: trial.arm for trial in trials}
    names = settings_of(before.runs.columns)
    here, kept = {trial.key for trial in trials}, set()
    for row in before.runs.rows:
        arm = arms.get(row["arm"])
        if arm is None or (key := key_of(row, names)) in here:
            continue
        # In the order of the search, as the folder is named.
        given = {name: row[name] for name in dict.fromkeys([*arm.search, *names]) if row.get(name)}
        if not _place(runs, arm.name, given, row["split"], row["seed"]).exists():
            kept.add(key)
    found = before.among(kept)
    for row in found.runs.rows:
        row |= {"label": arms[row["arm"]].label, "column": arms[row["arm"]].column, "chosen": ""}
    return found


def _best(trials: Sequence[Trial], metric: str) -> int | None:
    """The place of the greatest merit; None where none has any."""
    found = {place: merit for place, trial in enumerate(trials) if (merit := trial.merit(metric)) is not None}
    return max(found, key=lambda place: found[place]) if found else None


def _run(
    asked: Study,
    trials: Sequence[Trial],
    amount: Scale,
    folder: Path,
    absent: Mapping[str, str],
    workers: int | None,
    console: Console,
) -> list[Trial]:
    """The trials with what came of them; those of arms without data are not tried, nor those that are told of."""
    jobs = {}
    for place, trial in enumerate(trials):
        job = _job(asked, trial, amount, _runs(folder, amount))
        if trial.arm.name not in absent and (trial.told is None or finished(job.folder)):
            jobs[place] = job
    found = dict(zip(jobs, run_jobs(list(jobs.values()), workers, console), strict=True))
    outcomes = []
    for place, trial in enumerate(trials):
        if place in found:
            outcomes.append(_outcome(trial, found[place], asked))
        elif trial.told is not None:
            outcomes.append(trial)
        else:
            outcomes.append(_outcome(trial, MissingDataError(absent[trial.arm.name]), asked))
    return outcomes


def _runs(folder: Path, amount: Scale) -> Path:
    """The folder of all runs of a scale."""
    return folder / "runs" / ("tiny" if amount == "tiny" else f"{amount:g}")


def _job(asked: Study, trial: Trial, amount: Scale, runs: Path) -> Job:
    settings = [f"{setting.rpartition('.')[2]} {shown(value)}" for setting, value in trial.settings.items()]
    config = trial.arm.config(_length(asked, trial.kind, amount), trial.settings, trial.seed)
    if start := trial.arm.start:
        others = _runs(runs.parents[2] / start.path.stem, amount)
        weights = _place(others, start.arm, {}, start.scored, 0) / "last.ckpt"
        config = merge(config, {"model": {"init_args": {"weights": str(weights)}}})
    return Job(
        f"{asked.name}/{' '.join([trial.arm.name, *settings])}",
        trial.seed,
        config,
        _place(runs, trial.arm.name, trial.settings, trial.split, trial.seed),
        trial.split,
        keep=trial.kind == "final",
    )


def _place(runs: Path, arm: str, settings: Mapping[str, Any], split: str, seed: int | str) -> Path:
    """A run's folder; runs of other settings have other ones: a search may grow, and have another winner."""
    parts = ",".join(f"{setting}={shown(value)}" for setting, value in settings.items())
    return runs / arm / (re.sub(r"[^\w.=,+-]+", "-", parts) or "as-it-is") / f"{split}-seed-{seed}"


def _length(asked: Study, kind: str, amount: Scale) -> Scale:
    """How long a run is, as a share of the study's steps."""
    return amount if amount == "tiny" or kind == "final" else amount * asked.search_scale


def _outcome(trial: Trial, found: Result | Exception, asked: Study) -> Trial:
    if isinstance(found, Exception):
        # By which a module says that it diverged.
        return replace(trial, error=reason(found), failed=not isinstance(found, FloatingPointError), told=None)
    missing = asked.metric not in found.scores
    error = divergence(found)
    if missing:
        error = f"no score is called {asked.metric!r}; there are {', '.join(found.scores)}"
    return replace(trial, result=found, error=error, failed=missing, told=None)


def _settings(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(setting for trial in trials for setting in trial.settings))


def _scores(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(name for trial in trials if trial.result for name in trial.result.scores))


def _runs_table(asked: Study, trials: Sequence[Trial], scale: str) -> Table:
    """A row a run; between the columns that all studies have, the searched settings and the scores."""
    records = []
    for trial in trials:
        chosen = "yes" if trial.chosen else ""
        if trial.told is not None:
            records.append(trial.told[0] | {"label": trial.arm.label, "column": trial.arm.column, "chosen": chosen})
            continue
        record = {
            "study": asked.name,
            "arm": trial.arm.name,
            "label": trial.arm.label,
            "column": trial.arm.column,
            "kind": trial.kind,
            "seed": str(trial.seed),
            **{setting: shown(value) for setting, value in trial.settings.items()},
            "chosen": chosen,
            "split": trial.split,
            "scale": scale,
            "error": trial.error,
        }
        if trial.result:
            result = trial.result
            numbers = {
                **result.scores, "last_loss": result.last_loss, "seconds": result.seconds,
                "seconds_per_step": result.seconds_per_step,
            }  # fmt: skip
            record |= {name: f"{value:.6g}" for name, value in numbers.items()}
            record |= {"steps": str(len(result.losses)), **result.environment}
        records.append(record)
    given = [*PLANNED[:-2], *_settings(trials), *PLANNED[-2:], *_scores(trials), *MEASURED]
    others = (name for record in records for name in record)
    return Table(list(dict.fromkeys([*given, *others])), records)


def _curves_table(trials: Sequence[Trial]) -> Table:
    """For each run, its loss in windows, at each one's last step, and its validations."""
    records: list[Row] = []
    for trial in trials:
        if trial.told is not None:
            records += trial.told[1]
        if not trial.result:
            continue
        losses = trial.result.losses
        windows = min(WINDOWS, len(losses))
        edges = [len(losses) * place // windows for place in range(windows + 1)]
        rows: dict[int, dict[str, float]] = {
            end: {"loss": sum(losses[start:end]) / (end - start)} for start, end in itertools.pairwise(edges)
        }
        for each in trial.result.validations:
            rows.setdefault(int(each["step"]), {}).update({k: v for k, v in each.items() if k != "step"})
        common = {"arm": trial.arm.name, "kind": trial.kind, "seed": str(trial.seed)}
        common |= {setting: shown(value) for setting, value in trial.settings.items()}
        for step in sorted(rows):
            numbers = {name: f"{value:.6g}" for name, value in rows[step].items()}
            records.append({**common, "step": str(step), **numbers})
    names = ["arm", "kind", "seed", *_settings(trials), "step", "loss"]
    others = (name for record in records for name in record)
    return Table(list(dict.fromkeys([*names, *others])), records)
