"""Runs: one network trained and scored with one normalization, and many of them at the same time."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from torch import Tensor

from kalmannorm.lab import workers as pool
from kalmannorm.lab.data.digits import Split, cluttered_digits
from kalmannorm.lab.methods import METHODS
from kalmannorm.lab.models.small import SmallConvNet
from kalmannorm.lab.results import csv_text, write_atomically

TRAIN_IMAGES, SCORED_IMAGES = 8000, 2000

# The methods that the demo compares, and each one's best rate of one grid on validation images:
# docs/results/demo-search.md.
RATES = {"bn": 0.03, "gn": 0.01, "kn-paper": 0.003, "kn": 0.01}
# 32 groups would leave each of the first layer's 16 channels by itself.
OPTIONS: dict[str, dict[str, Any]] = {"gn": {"groups": 4}}


@dataclass(frozen=True)
class Job:
    """A run, described so that it can be sent to another process and repeated from its record.

    Attributes:
        method: A key of `kalmannorm.lab.methods.METHODS`.
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
    schedule: Literal["cosine", "warmup"] = "warmup"
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
    from kalmannorm.lab.curve import Curve  # noqa: PLC0415
    from kalmannorm.lab.training import Classifier, loader, quiet_trainer  # noqa: PLC0415

    torch.manual_seed(job.seed)
    classifier = Classifier(
        SmallConvNet(),
        job.method,
        normalization_options=OPTIONS.get(job.method),
        num_classes=10,
        statistics_batch=job.batch,
        rate=job.rate,
        steps=job.steps,
        schedule=job.schedule,
    )
    curve = Curve(tell)
    trainer = quiet_trainer(job.steps, curve)
    trainer.fit(classifier, loader(*images("train", job.data_seed), job.batch, job.seed))
    score = trainer.test if job.split == "test" else trainer.validate
    (scores,) = score(classifier, loader(*images(job.split, job.data_seed), 500), verbose=False)
    seconds = statistics.median(curve.seconds)
    return Result(job, scores["accuracy_running"], scores["accuracy_online"], seconds, curve.losses)


def run_all(jobs: Sequence[Job], workers: int, console: Console) -> list[Result]:
    """Run ``jobs`` in ``workers`` processes of one thread each; the results are in the order of ``jobs``."""
    # No errors are among them: the first would have been raised.
    return cast("list[Result]", pool.run_all(jobs, run, lambda job: job.steps, workers, console))


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write a line a run: its job and its numbers, without the curve."""
    numbers = ("accuracy_running", "accuracy_online", "last_loss", "seconds_per_step")
    records = [asdict(result.job) | {name: f"{getattr(result, name):.6g}" for name in numbers} for result in results]
    write_atomically(path, csv_text(records))


def write_json(path: Path, results: Sequence[Result], environment: dict[str, str]) -> None:
    """Write everything that is known of each run, its curve included, and where it ran."""
    runs = []
    for result in results:
        # JSON has no NaN: a run that diverged shows nulls in its curve.
        losses = [round(loss, 4) if math.isfinite(loss) else None for loss in result.losses]
        runs.append(asdict(result) | {"losses": losses})
    path.write_text(json.dumps({"environment": environment, "runs": runs}), encoding="utf-8")
