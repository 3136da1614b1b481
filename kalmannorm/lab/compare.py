"""Which normalization to use: the same search and the same trainings with each, on one's own images."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.lab.data.folders import FolderData
from kalmannorm.lab.methods import METHODS, normalize
from kalmannorm.lab.results import Result, csv_text, finished, write_atomically
from kalmannorm.lab.trainings import Job, divergence, reason, run_jobs
from kalmannorm.lab.workers import available_cpus

if TYPE_CHECKING:
    from kalmannorm.lab.fitting import Split

__all__ = ["Outcome", "Plan", "by_method", "classifier", "compare"]


def classifier(name: str, num_classes: int) -> nn.Module:
    """An untrained classifier of torchvision that has BatchNorm, from ``(N, 3, H, W)`` to ``(N, num_classes)``.

    Raises:
        ValueError: There is none of this name, or it has no BatchNorm to replace.
    """
    from torchvision import models  # noqa: PLC0415 - slow

    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, 3) or ["resnet18", "mobilenet_v2", "efficientnet_b0"]
        raise ValueError(f"torchvision has no classifier {name!r}; it has for example {', '.join(close)}")
    build: Callable[..., nn.Module] = models.get_model_builder(name)
    # Without auxiliary heads, whose outputs would come beside the logits; only these two have them.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network = build(weights=None, num_classes=num_classes, **options)
    if not any(isinstance(layer, _BatchNorm) for layer in network.modules()):
        raise ValueError(f"torchvision's {name} has no BatchNorm, so there is nothing to compare")
    return network


@dataclass(frozen=True)
class Plan:
    """What is compared, alike for all methods; see `compare`."""

    folder: str
    methods: tuple[str, ...]
    statistics_batch: int
    gradient_batch: int
    network: str
    size: int
    steps: int
    rates: tuple[float, ...]
    seeds: int
    num_classes: int
    test_images: int
    guessing: float
    """Accuracy of who names the largest class of the test images each time."""

    def trial(self, method: str, rate: float, seed: int, split: Split, output: Path) -> Outcome:
        """A run that nothing has come of yet, in a folder below ``output``."""
        kind, name = ("search", f"rate-{rate:g}") if split == "validation" else ("runs", f"seed-{seed}")
        what = f"{kind}/{METHODS[method].label}, rate {rate:g}"
        folder, config = output / kind / f"{method}-{name}", self.config(method, rate, seed)
        return Outcome(method, rate, Job(what, seed, config, folder, split, keep=kind == "runs"))

    def config(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """What `kalmannorm.lab.fitting.fit` takes."""
        network = {"name": self.network, "num_classes": self.num_classes}
        return {
            "seed_everything": seed,
            "model": {
                "class_path": "kalmannorm.lab.training.Classifier",
                "init_args": {
                    "network": {"class_path": "kalmannorm.lab.compare.classifier", "init_args": network},
                    "normalization": method,
                    "num_classes": self.num_classes,
                    "statistics_batch": self.statistics_batch,
                    "rate": rate,
                    "schedule": "warmup",
                },
            },
            "data": {
                "class_path": "kalmannorm.lab.data.folders.FolderData",
                "init_args": {
                    "folder": self.folder,
                    "gradient_batch": self.gradient_batch,
                    "size": self.size,
                    # A process that trains on the CPU has one core, and would wait for its own workers.
                    "workers": 4 if torch.cuda.is_available() else 0,
                },
            },
            # Scored when it has ended, and not before.
            "trainer": {"max_steps": self.steps, "val_check_interval": self.steps + 1},
            "checkpoint_every": min(1000, self.steps),
        }


@dataclass(frozen=True)
class Outcome:
    """A run, and what came of it.

    Attributes:
        method: A key of METHODS.
        rate: Learning rate.
        job: The training; of the search if it is scored on validation images, one of those that count on test images.
        result: If it came to an end.
        error: Why it does not count: what it raised, or how it diverged; empty where it does.
    """

    method: str
    rate: float
    job: Job
    result: Result | None = None
    error: str = ""

    @property
    def accuracy(self) -> float:
        """By running statistics, as in plain ``eval()``; 0 to 1, and 0 where the run does not count."""
        return self.result.scores["accuracy_running"] if self.result and not self.error else 0.0

    @property
    def last_loss(self) -> float:
        """Mean training loss of the last tenth of the steps."""
        return self.result.last_loss if self.result else math.nan

    @property
    def said(self) -> str:
        """Which run it is, and why it does not count."""
        return f"{self.job} {'' if self.result else 'failed: '}{self.error}"


def compare(
    folder: str,
    *,
    methods: str = "bn,gn,kn",
    statistics_batch: int = 2,
    gradient_batch: int | None = None,
    network: str = "resnet18",
    size: int = 64,
    steps: int = 1000,
    rates: str = "0.003,0.01,0.03,0.1",
    seeds: int = 3,
    workers: int | None = None,
    output: Path = Path("runs/compare"),
) -> None:
    """Find out which normalization to use on your images, at your batch size.

    Each method is trained once at each rate, in full, and scored on validation images; then at its best rate from
    other seeds, and scored on test images, once. What was interrupted goes on when it is called again.

    Args:
        folder: Images, one folder a class; or with train, val and perhaps test folders around those.
        methods: Which to compare, separated by commas: some of bn, brn, gn, ln, in, wn, ghost, sync, mabn, cbn,
            evonorm, frn, kn, kn-paper, kn-released, gkn.
        statistics_batch: Images that are normalized together.
        gradient_batch: Images a training step, if more than that.
        network: A classifier of torchvision with BatchNorm.
        size: Side of the images, in pixels.
        steps: Training steps of each run.
        rates: Learning rates to search, separated by commas.
        seeds: Runs of each method that count.
        workers: Processes that train at the same time; as many as there are CPUs or GPUs if not given.
        output: Folder for the runs, the table and the report.
    """
    counts = {"statistics_batch": statistics_batch, "size": size, "steps": steps, "seeds": seeds, "workers": workers}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1; got {value}")
    images = statistics_batch if gradient_batch is None else gradient_batch
    if images % statistics_batch or images < 1:
        raise ValueError(f"--gradient_batch: expected a multiple of statistics_batch={statistics_batch}; got {images}")
    keys = tuple(dict.fromkeys(name.strip() for name in methods.split(",")))
    data = _checked_data(folder, size, images)
    _check_methods(keys, network, data.num_classes, statistics_batch, size)
    plan = Plan(folder, keys, statistics_batch, images, network, size, steps, _numbers(rates), seeds,
                data.num_classes, len(data.test_set), _largest_share(data))  # fmt: skip
    _claim(output, plan)
    console = Console()
    processes = workers or torch.cuda.device_count() or available_cpus()
    search = [plan.trial(key, rate, 0, "validation", output) for key in keys for rate in plan.rates]
    searched = _run(search, processes, console)
    best = {key: _best(outcomes) for key, outcomes in by_method(searched).items()}
    final = [
        plan.trial(key, rate, seed, "test", output)
        for key, rate in best.items() if rate is not None
        for seed in range(1, seeds + 1)
    ]  # fmt: skip
    counted = _run(final, processes, console)
    write_atomically(output / "results.csv", _as_csv([*searched, *counted]))
    if not any(by_method(counted).values()):
        first = next(outcome for outcome in (*counted, *searched) if outcome.error)
        raise ValueError(f"each run failed or diverged, so there is nothing to compare; {first.said}")

    from kalmannorm.lab.compare_report import terminal_table, write_page  # noqa: PLC0415 - matplotlib is slow

    page = write_page(output / "report.html", plan, searched, counted, min(processes, len(final)))
    console.print(terminal_table(plan, counted))
    for outcome in (*searched, *counted):
        if outcome.error:
            console.print(f"Left out: {outcome.said}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)


def by_method(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes that neither failed nor diverged, by method; an empty list where all did."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.method, []).extend([outcome] if outcome.result and not outcome.error else [])
    return groups


def _best(outcomes: Sequence[Outcome]) -> float | None:
    """The rate of the highest validation accuracy, of equal ones that of the lower training loss; of `by_method`."""
    return max(outcomes, key=lambda o: (o.accuracy, -o.last_loss)).rate if outcomes else None


def _run(trials: Sequence[Outcome], workers: int, console: Console) -> list[Outcome]:
    """The trials with what came of them; those that ended in an earlier call are only read."""
    found = {trial.job.folder: Result.read(trial.job.folder) for trial in trials if finished(trial.job.folder)}
    left = [trial.job for trial in trials if trial.job.folder not in found]
    new = iter(run_jobs(left, workers, console))
    return [_ended(trial, found.get(trial.job.folder) or next(new)) for trial in trials]


def _ended(trial: Outcome, found: Result | Exception) -> Outcome:
    if isinstance(found, Exception):
        return replace(trial, error=reason(found))
    return replace(trial, result=found, error=divergence(found))


def _numbers(rates: str) -> tuple[float, ...]:
    try:
        numbers = tuple(dict.fromkeys(float(rate) for rate in rates.split(",")))
    except ValueError:
        raise ValueError(f"--rates: expected numbers separated by commas; got {rates!r}") from None
    if not all(0 < rate < math.inf for rate in numbers):
        raise ValueError(f"--rates: expected numbers above 0; got {rates!r}")
    return numbers


def _checked_data(folder: str, size: int, images: int) -> FolderData:
    data = FolderData(folder, images, size=size)
    data.setup()
    if data.num_classes < 2:
        raise ValueError(f"{folder}: expected images of at least 2 classes; got {data.classes}")
    if images > len(data.train_set):
        raise ValueError(f"--gradient_batch: expected at most the {len(data.train_set)} training images; got {images}")
    return data


def _largest_share(data: FolderData) -> float:
    """Of the test images, the share of the class that most of them are of."""
    labels = torch.tensor(data.test_set.dataset.targets)[data.test_set.indices]  # type: ignore[attr-defined]
    return int(labels.bincount().max()) / len(labels)


def _check_methods(methods: Sequence[str], name: str, num_classes: int, statistics_batch: int, size: int) -> None:
    """Refuse now what would fail in every run."""
    network = classifier(name, num_classes).eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, size, size))
    except RuntimeError as error:
        raise ValueError(f"--size: {name} cannot take images of {size} pixels: {error}") from error
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--methods: unknown method {method!r}; expected some of {', '.join(METHODS)}")
        if method == "frozen":
            raise ValueError(
                "--methods: 'frozen' keeps the statistics of a trained network, and these are untrained; leave it out"
            )
        try:
            normalize(classifier(name, num_classes), method, statistics_batch=statistics_batch)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--methods: {method} does not suit {name}: {error}") from error


def _claim(output: Path, plan: Plan) -> None:
    """Make the output folder this comparison's, unless it is another's."""
    mine = json.loads(json.dumps(plan.__dict__))
    path = output / "compare.json"
    try:
        if path.exists():
            other = json.loads(path.read_text(encoding="utf-8"))
            for name, value in mine.items():
                if other.get(name) != value:
                    raise ValueError(
                        f"--output: {output} holds a comparison with {name}={other.get(name)}; got {value}"
                    )
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(mine, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"--output: cannot write to {output}: {error.strerror}") from error


def _as_csv(outcomes: Sequence[Outcome]) -> str:
    records = []
    for outcome in outcomes:
        job, result = outcome.job, outcome.result
        numbers = {}
        if result:
            numbers = {**result.scores, "last_loss": result.last_loss, "seconds_per_step": result.seconds_per_step}
        records.append({
            "method": outcome.method, "rate": f"{outcome.rate:g}", "seed": job.seed, "split": job.split,
            **{name: f"{number:.6g}" for name, number in numbers.items()}, "error": outcome.error,
        })  # fmt: skip
    names = ["method", "rate", "seed", "split", "accuracy_running", "accuracy_online", "last_loss",
             "seconds_per_step", "error"]  # fmt: skip
    return csv_text(records, names)
