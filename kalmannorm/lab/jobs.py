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
from kalmannorm.lab.workers import Tell, available_cpus, in_turn, run_all


@dataclass(frozen=True)
class Job:
    """A training, such as ``"table8/resnet32-kn-bs2"``, with its configuration, seed and folder.

    Scores and curves stay once the run has ended; with ``keep`` the last checkpoint too.
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


def run_jobs(jobs: Sequence[Job], workers: int | None, console: Console) -> list[Result | Exception]:
    """What comes of trainings, in their order: each a result, or what it raised.

    Those on several devices run one after another; of others so many at the same time, by default
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


def _fit(job: Job, tell: Tell) -> Result:
    result = fit(job.config, job.folder, tell, split=job.split)
    if not job.keep:
        (job.folder / "last.ckpt").unlink(missing_ok=True)
    return result


def fit_on_devices(job: Job) -> Result:
    """A training on several devices, as a command of its own: Lightning starts a process for each device from it.

    What it prints goes into a file beside the run's folder.

    Raises:
        RuntimeError: The command failed; with its last line.
    """
    folder = job.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, log = folder.with_name(f"{folder.name}.yaml"), folder.with_name(f"{folder.name}.log")
    file.write_text(yaml.safe_dump(job.config, sort_keys=False), encoding="utf-8")
    line = [sys.executable, "-m", "kalmannorm.lab.cli", "fit", "--config", str(file), "--output", str(folder)]
    line += ["--split", job.split] if job.split else []
    with (
        log.open("w", encoding="utf-8") as output,
        # A group of its own, so that all of its processes can be ended together.
        subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code:
        said = [text for text in log.read_text(encoding="utf-8").splitlines() if text.strip()]
        # Of several processes, the first that ended says why; those after it, that they lost it.
        errors = [text for text in said if re.match(r"(kalmannorm|\w*(Error|Exception)): ", text)]
        why = errors[0] if errors else said[-1] if said else "it said nothing"
        raise RuntimeError(f"{why} (exit code {code}; all of it is in {log.name})")
    return Result.read(folder)


def divergence(result: Result) -> str:
    """What is not finite at a run's end; empty where all is."""
    if not math.isfinite(result.last_loss):
        step = next(step for step, loss in enumerate(result.losses, 1) if not math.isfinite(loss))
        return f"diverged: the loss was {result.losses[step - 1]} at step {step}"
    wrong = [f"{name} is {value}" for name, value in result.scores.items() if not math.isfinite(value)]
    return f"diverged: {', '.join(wrong)}" if wrong else ""
