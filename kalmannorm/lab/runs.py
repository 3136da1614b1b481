"""Runs: one network trained and scored with one normalization, and many of them at the same time."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import signal
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import kalmannorm
from kalmannorm.lab.baselines.group import to_groupnorm
from kalmannorm.lab.data.digits import Split, cluttered_digits
from kalmannorm.lab.models.small import SmallConvNet

TRAIN_IMAGES, SCORED_IMAGES = 8000, 2000


@dataclass(frozen=True)
class Method:
    """A normalization.

    Attributes:
        label: Its name in tables.
        replace: Puts it in the place of a model's BatchNorm layers, and returns the model.
        rate: Its learning rate, unless a run asks for another.
        colour: Its colour in figures.
    """

    label: str
    replace: Callable[[nn.Module], nn.Module]
    rate: float
    colour: str


def _keep(model: nn.Module) -> nn.Module:
    return model


def _kalman_paper(model: nn.Module) -> nn.Module:
    return kalmannorm.convert(model, **kalmannorm.preset("paper"))


# The rates are each method's best of one grid on validation images: docs/results/demo-search.md.
METHODS = {
    "bn": Method("BatchNorm", _keep, 0.03, "#c44e52"),
    "gn": Method("GroupNorm", to_groupnorm, 0.01, "#8c8c8c"),
    "kn-paper": Method("KalmanNorm (paper)", _kalman_paper, 0.003, "#dd8452"),
    "kn": Method("KalmanNorm (default)", kalmannorm.convert, 0.01, "#4c72b0"),
}


@dataclass(frozen=True)
class Job:
    """A run, described so that it can be sent to another process and repeated from its record.

    Attributes:
        method: A key of `METHODS`.
        seed: Fixes the initial weights and the order of the images, alike for all methods.
        steps: Training steps.
        rate: Learning rate of the first step.
        batch: Images a step, and images a group when they are scored with online statistics.
        schedule: How the rate falls, see `kalmannorm.lab.training.Classifier`.
        data_seed: Fixes the images.
        split: The split that the network is scored on.
    """

    method: str
    seed: int
    steps: int
    rate: float
    batch: int = 2
    schedule: str = "warmup"
    data_seed: int = 0
    split: Split = "test"

    def __str__(self) -> str:
        """What a progress bar calls it."""
        return f"{METHODS[self.method].label}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What a run gave: accuracies from 0 to 1, the median seconds a step, and the loss of each step."""

    job: Job
    accuracy_running: float
    accuracy_online: float
    seconds_per_step: float
    losses: list[float]

    @property
    def last_loss(self) -> float:
        """Mean training loss of the last tenth of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])


@cache
def images(split: Split, data_seed: int) -> tuple[Tensor, Tensor]:
    """The images and labels of a split that all runs share; made once a process."""
    return cluttered_digits(split, TRAIN_IMAGES if split == "train" else SCORED_IMAGES, data_seed)


def run(job: Job, tell: Callable[[int], None] = lambda step: None) -> Result:
    """Train and score one network; the same job gives the same numbers.

    Args:
        job: What to do.
        tell: Called now and then with the number of steps done.
    """
    # Lightning takes seconds to import, and only the processes that train need it.
    from kalmannorm.lab.training import Classifier, Recorder, loader, quiet_trainer  # noqa: PLC0415

    torch.manual_seed(job.seed)
    classifier = Classifier(
        METHODS[job.method].replace(SmallConvNet()),
        num_classes=10,
        rate=job.rate,
        steps=job.steps,
        schedule=job.schedule,
        statistics_batch=job.batch,
    )
    recorder = Recorder(tell)
    trainer = quiet_trainer(job.steps, recorder)
    trainer.fit(classifier, loader(*images("train", job.data_seed), job.batch, job.seed))
    score = trainer.test if job.split == "test" else trainer.validate
    (scores,) = score(classifier, loader(*images(job.split, job.data_seed), 500), verbose=False)
    seconds = statistics.median(recorder.seconds)
    return Result(job, scores["accuracy_running"], scores["accuracy_online"], seconds, recorder.losses)


_queue: Any = None


def _start_worker(queue: Any) -> None:
    global _queue  # noqa: PLW0603  (a queue can only be handed to a process when it starts)
    _queue = queue
    torch.set_num_threads(1)
    # Ctrl-C is the parent's to answer; and no worker outlives a parent that was killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job) -> Result:
    return run(job, lambda step: _queue.put((os.getpid(), job, step)))


def run_all(jobs: Sequence[Job], workers: int, console: Console) -> list[Result]:
    """Run ``jobs`` in ``workers`` processes of one thread each, with a progress bar a process.

    Returns:
        The results, in the order of ``jobs``.
    """
    # Fresh processes: a forked one would inherit torch's thread pools in whatever state they are.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    others = set(multiprocessing.active_children())
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(workers, context, _start_worker, (queue,)) as pool,
    ):
        overall = progress.add_task("all steps", total=sum(job.steps for job in jobs))
        bars: dict[int, tuple[Job, TaskID]] = {}
        steps: dict[Job, int] = {}
        futures = [pool.submit(_work, job) for job in jobs]
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, 0.2, FIRST_COMPLETED)
                for future in done:
                    future.result()  # raises here what went wrong there
                while not queue.empty():
                    worker, job, step = queue.get()
                    if worker not in bars or bars[worker][0] != job:
                        if worker in bars:
                            progress.remove_task(bars[worker][1])
                        bars[worker] = (job, progress.add_task(str(job), total=job.steps))
                    steps[job] = step
                    progress.update(bars[worker][1], completed=step)
                    progress.update(overall, completed=sum(steps.values()))
        except BaseException:
            # Without this, leaving the pool would wait for every run that has begun.
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise
        for _, bar in bars.values():
            progress.remove_task(bar)
        progress.update(overall, completed=sum(job.steps for job in jobs))
    return [future.result() for future in futures]


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write a line a run: its job and its numbers, without the curve."""
    numbers = ("accuracy_running", "accuracy_online", "last_loss", "seconds_per_step")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*asdict(results[0].job), *numbers])
        for result in results:
            cells = [f"{getattr(result, name):.6g}" for name in numbers]
            writer.writerow([*asdict(result.job).values(), *cells])


def write_json(path: Path, results: Sequence[Result], environment: dict[str, str]) -> None:
    """Write everything that is known of each run, its curve included, and where it ran."""
    runs = []
    for result in results:
        # JSON has no NaN: a run that diverged shows nulls in its curve.
        losses = [round(loss, 4) if math.isfinite(loss) else None for loss in result.losses]
        runs.append(asdict(result) | {"losses": losses})
    path.write_text(json.dumps({"environment": environment, "runs": runs}), encoding="utf-8")
