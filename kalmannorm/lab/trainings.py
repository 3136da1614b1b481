"""The trainings behind a table's cells: each network once a seed, however many cells show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from kalmannorm.lab.launching import fit_on_devices
from kalmannorm.lab.recipes import merge
from kalmannorm.lab.results import Result
from kalmannorm.lab.tables import Cell, steps_to_reach
from kalmannorm.lab.workers import Tell, available_cpus, in_turn, run_all

if TYPE_CHECKING:
    from kalmannorm.lab.fitting import Split

__all__ = ["Job", "compare_with_baselines", "divergence", "folder_of", "reason", "run_jobs", "train"]


@dataclass(frozen=True)
class Job:
    """A training: a recipe's configuration with a seed, and its folder.

    Attributes:
        name: Such as ``"table8/resnet32-kn-bs2"``.
        seed: Also in ``config``.
        config: What ``fit`` takes.
        folder: Where the run is kept.
        split: Which images are scored, see `kalmannorm.lab.fitting.fit`.
        keep: Keep the last checkpoint once the run has ended, and not the scores and curves alone.
    """

    name: str
    seed: int
    config: dict[str, Any]
    folder: Path
    split: Split | None = None
    keep: bool = True

    def __str__(self) -> str:
        """What a progress bar calls it."""
        return f"{self.name.partition('/')[2]}, seed {self.seed}"


def folder_of(runs: Path, cell: Cell, seed: int) -> Path:
    """Where the training of a cell is, in the folder of all runs of a scale."""
    return runs / cell.recipe.run / f"seed-{seed}"


def train(
    cells: Sequence[Cell], runs: Path, seeds: Sequence[int], devices: int, workers: int | None, console: Console
) -> bool:
    """Train each cell's network with each seed, and put the results, or the reasons why not, into the cells.

    A run that diverged is a reason: its chance accuracy says nothing of the others'.

    Args:
        cells: Whose data are here.
        runs: Folder of all runs of a scale.
        seeds: Of the trainings.
        devices: Devices a training; with several, trainings run one after another.
        workers: Trainings at the same time, by default as many as there are GPUs, or else CPUs.
        console: Where the progress bars are.

    Returns:
        Whether a training failed; one that diverged did not.
    """
    jobs: dict[Path, Job] = {}
    for cell in cells:
        for seed in seeds:
            folder = folder_of(runs, cell, seed)
            jobs[folder] = Job(cell.recipe.run, seed, merge(cell.config, {"seed_everything": seed}), folder)
    todo = list(jobs.values())
    outcomes: Sequence[Result | Exception] = []
    if devices > 1:
        outcomes = in_turn(todo, lambda job: fit_on_devices(devices, job.config, job.folder), _steps, console)
    else:
        outcomes = run_jobs(todo, workers, console)
    results = dict(zip(jobs, outcomes, strict=True))
    for cell in cells:
        for seed in seeds:
            result = results[folder_of(runs, cell, seed)]
            if isinstance(result, Exception):
                cell.problems.append(f"seed {seed} failed: {reason(result)}")
            elif wrong := divergence(result):
                cell.problems.append(f"seed {seed} {wrong}")
            else:
                cell.runs[seed] = result
    return any(isinstance(each, Exception) and not isinstance(each, FloatingPointError) for each in outcomes)


def run_jobs(jobs: Sequence[Job], workers: int | None, console: Console) -> list[Result | Exception]:
    """What comes of trainings in a pool of processes, in their order: each a result, or what it raised.

    Args:
        jobs: To be done; what is finished is only read.
        workers: Trainings at the same time, by default as many as there are GPUs, or else CPUs.
        console: Where the progress bars are.
    """
    if not jobs:
        return []
    count = workers or torch.cuda.device_count() or available_cpus()
    return run_all(jobs, _fit, _steps, count, console, keep_going=True)


def _steps(job: Job) -> int:
    return int(job.config["trainer"]["max_steps"])


def _fit(job: Job, tell: Tell) -> Result:
    # Lightning takes seconds to import, and only the processes that train need it.
    from kalmannorm.lab.fitting import fit  # noqa: PLC0415

    result = fit(job.config, job.folder, tell, split=job.split)
    if not job.keep:
        (job.folder / "last.ckpt").unlink(missing_ok=True)
    return result


def reason(error: Exception) -> str:
    """One line that says what went wrong; of jsonargparse's several, what the class itself said."""
    text = str(error)
    said = text.partition("Errors:\n  - ")[2].partition("\n")[0]
    return f"{type(error).__name__}: {said or ' '.join(text.split())[:300]}"


def divergence(result: Result) -> str:
    """What is not finite at a run's end; empty where all is."""
    if not math.isfinite(result.last_loss):
        step = next(step for step, loss in enumerate(result.losses, 1) if not math.isfinite(loss))
        return f"diverged: the loss was {result.losses[step - 1]} at step {step}"
    wrong = [f"{name} is {value}" for name, value in result.scores.items() if not math.isfinite(value)]
    return f"diverged: {', '.join(wrong)}" if wrong else ""


def compare_with_baselines(cells: Sequence[Cell]) -> None:
    """How many steps each run took to be as good as its baseline is at its end, both on validation images."""
    by_name = {cell.recipe.name: cell for cell in cells}
    for cell in cells:
        baseline = by_name.get(cell.recipe.cell.get("baseline", ""))
        last = [run.validations[-1] for run in baseline.runs.values() if run.validations] if baseline else []
        goals = [each[cell.metric] for each in last if cell.metric in each]
        if goals:
            goal = sum(goals) / len(goals)
            cell.reached = {seed: steps_to_reach(run, cell.metric, goal) for seed, run in cell.runs.items()}
