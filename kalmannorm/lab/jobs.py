"""Trainings in a pool of processes, or one after another on several devices each."""

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from kalmannorm.lab.experiments import Split
from kalmannorm.lab.fitting import fit
from kalmannorm.lab.results import Result
from kalmannorm.lab.workers import OnProgress, available_cpus, in_turn, run_all


@dataclass(frozen=True)
class Job:
    """A training of an arm, such as ``"resnet32-kn-bs2"``, with its configuration, seed and folder.

    ``keep`` keeps the last checkpoint after the run has finished.
    """

    name: str
    seed: int
    config: dict[str, Any]
    folder: Path
    split: Split | None = None
    keep: bool = True

    def __str__(self) -> str:
        """Its label in a progress bar."""
        return f"{self.name}, seed {self.seed}"


def run_jobs(jobs: Sequence[Job], workers: int | None, console: Console) -> list[Result | Exception]:
    """Run trainings, and return each one's result, or the exception that it raised.

    Trainings on several devices run one after another; others run ``workers`` at a time, by default
    as many as there are GPUs, or else CPUs.
    """
    if not jobs:
        return []
    if jobs[0].config["trainer"].get("devices", 1) not in (1, "auto"):
        return in_turn(jobs, fit_on_devices, _steps, console)
    count = min(workers or torch.cuda.device_count() or available_cpus(), len(jobs))
    return run_all(jobs, _fit, _steps, count, console)


def _steps(job: Job) -> int:
    return int(job.config["trainer"]["max_steps"])


def _fit(job: Job, on_progress: OnProgress) -> Result:
    result = fit(job.config, job.folder, on_progress, split=job.split)
    if not job.keep:
        (job.folder / "last.ckpt").unlink(missing_ok=True)
    return result


def fit_on_devices(job: Job) -> Result:
    """Train on several devices in a command of its own, of which Lightning starts a process for each device.

    Its output goes to a log file next to the run's folder.

    Raises:
        RuntimeError: The command failed; the message has its first error, or else its last line.
    """
    folder = job.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, log = folder.with_name(f"{folder.name}.yaml"), folder.with_name(f"{folder.name}.log")
    file.write_text(yaml.safe_dump(job.config, sort_keys=False), encoding="utf-8")
    line = [sys.executable, "-m", "kalmannorm.lab.cli", "fit", "--config", str(file), "--output", str(folder)]
    line += ["--split", job.split] if job.split else []
    with (
        log.open("w", encoding="utf-8") as output,
        # A session of its own, so that all its processes can be killed together.
        subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code:
        lines = [text for text in log.read_text(encoding="utf-8").splitlines() if text.strip()]
        # The first process that failed prints the cause; the others, that they lost the connection to it.
        errors = [text for text in lines if re.match(r"(kalmannorm|\w*(Error|Exception)): ", text)]
        cause = errors[0] if errors else lines[-1] if lines else "it printed nothing"
        raise RuntimeError(f"{cause} (exit code {code}; the whole output is in {log.name})")
    return Result.read(folder)


def divergence(result: Result) -> str:
    """The message for a loss or score that is not finite; empty if all are finite."""
    if not math.isfinite(result.last_loss):
        step = next(step for step, loss in enumerate(result.losses, 1) if not math.isfinite(loss))
        return f"diverged: the loss was {result.losses[step - 1]} at step {step}"
    wrong = [f"{name} is {value}" for name, value in result.scores.items() if not math.isfinite(value)]
    return f"diverged: {', '.join(wrong)}" if wrong else ""
