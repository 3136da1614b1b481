"""The demo: four normalizations learn cluttered digits from two images a step, and you see which can."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

import kalmannorm
from kalmannorm.lab import figures, report
from kalmannorm.lab.data.digits import Split
from kalmannorm.lab.methods import METHODS
from kalmannorm.lab.runs import RATES, SCORED_IMAGES, Job, Result, images, run_all, write_csv, write_json
from kalmannorm.lab.tables import with_spread
from kalmannorm.lab.workers import available_cpus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = ("", "accuracy, running stats", "accuracy, online stats", "last training loss", "ms a step")


def demo(
    *,
    methods: str = ",".join(RATES),
    seeds: int = 3,
    steps: int = 3000,
    rate: float | None = None,
    data_seed: int = 0,
    validation: bool = False,
    workers: int | None = None,
    output: Path = Path("runs/demo"),
) -> None:
    """Compare normalizations at two images a step, in about four minutes on two cores.

    Args:
        methods: Which to compare, separated by commas: bn, gn, kn-paper, kn.
        seeds: Runs of each method, with seeds 0, 1, ...
        steps: Training steps of each run.
        rate: One learning rate for all methods, in place of each one's own best.
        data_seed: Decides which digits go into which split, and how the images are composed.
        validation: Score on the validation split, and leave the test split alone.
        workers: Processes that train at the same time; as many as there are CPUs if not given.
        output: Folder for the report and the raw results.
    """
    keys = _checked(
        methods=methods,
        seeds=seeds,
        steps=steps,
        rate=rate,
        data_seed=data_seed,
        workers=workers,
        output=output,
    )
    start = time.perf_counter()
    split: Split = "validation" if validation else "test"
    jobs = [
        Job(key, seed, steps, RATES[key] if rate is None else rate, data_seed=data_seed, split=split)
        for key in keys
        for seed in range(seeds)
    ]
    console = Console()
    # The slowest method first, so that no process is left alone with it at the end.
    order = sorted(jobs, key=lambda job: job.method != "kn-paper")
    found = {result.job: result for result in run_all(order, min(workers or available_cpus(), len(jobs)), console)}
    results = [found[job] for job in jobs]

    environment = {
        "command": _command_line(
            keys=keys, seeds=seeds, steps=steps, rate=rate, data_seed=data_seed, validation=validation
        ),
        "kalmannorm": kalmannorm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {available_cpus()} CPUs",
        "seconds": f"{time.perf_counter() - start:.0f}",
    }
    write_csv(output / "results.csv", results)
    write_json(output / "results.json", results, environment)
    page = write_page(output / "report.html", results, environment)
    console.print(_terminal_table(results))
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)


def _checked(
    *,
    methods: str,
    seeds: int,
    steps: int,
    rate: float | None,
    data_seed: int,
    workers: int | None,
    output: Path,
) -> list[str]:
    """Refuse what cannot be run, and make the output folder.

    Returns:
        The methods' keys, each once.
    """
    keys = [name.strip() for name in methods.split(",")]
    for key in keys:
        if key not in RATES:
            raise ValueError(f"--methods: unknown method {key!r}; expected some of {', '.join(RATES)}")
    counts = (("seeds", seeds, 1), ("steps", steps, 1), ("workers", workers, 1), ("data_seed", data_seed, 0))
    for name, value, least in counts:
        if value is not None and value < least:
            raise ValueError(f"--{name}: expected at least {least}; got {value}")
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"--rate: expected a number above 0; got {rate:g}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: cannot make the folder {output}: {error.strerror}") from error
    return list(dict.fromkeys(keys))


def _command_line(
    *, keys: Sequence[str], seeds: int, steps: int, rate: float | None, data_seed: int, validation: bool
) -> str:
    line = f"kalmannorm demo --methods {','.join(keys)} --seeds {seeds} --steps {steps} --data_seed {data_seed}"
    return line + ("" if rate is None else f" --rate {rate:g}") + (" --validation" if validation else "")


def _by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.job.method, []).append(result)
    return groups


def summarize(results: Sequence[Result]) -> list[list[str]]:
    """A row a method under `HEADER`: accuracies in %, mean and standard deviation over seeds."""
    return [
        [
            METHODS[key].label,
            with_spread([100 * result.accuracy_running for result in own], 1),
            with_spread([100 * result.accuracy_online for result in own], 1),
            with_spread([result.last_loss for result in own], 3),
            f"{1000 * statistics.fmean([result.seconds_per_step for result in own]):.1f}",
        ]
        for key, own in _by_method(results).items()
    ]


def _seeds(results: Sequence[Result]) -> str:
    count = len({result.job.seed for result in results})
    return "1 seed" if count == 1 else f"{count} seeds"


def _terminal_table(results: Sequence[Result]) -> Table:
    job = results[0].job
    table = Table(
        title=f"{job.batch} images a step, {job.steps} steps, {_seeds(results)}",
        caption=f"accuracy in % on {job.split} images, mean ± deviation; guessing gives 10",
    )
    # Wide enough that only headings wrap, also on a terminal of 80 columns.
    for name, width in zip(HEADER, (20, 13, 12, 13, 4), strict=True):
        table.add_column(name, justify="right" if name else "left", width=width)
    for row in summarize(results):
        table.add_row(*row)
    return table


def _draw_results(results: Sequence[Result]) -> Figure:
    return figures.learning(
        [
            figures.Runs(
                METHODS[key].label,
                METHODS[key].colour,
                [result.losses for result in own],
                {
                    "running statistics": [100 * result.accuracy_running for result in own],
                    "online statistics": [100 * result.accuracy_online for result in own],
                },
            )
            for key, own in _by_method(results).items()
        ]
    )


def _draw_inputs(split: Split, data_seed: int) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415

    drawing = Figure(figsize=(10, 2.9))
    for axes, image, label in zip(drawing.subplots(2, 8).flat, *images(split, data_seed), strict=False):
        axes.imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1)
        axes.set_title(str(int(label)), fontsize=11)
        axes.axis("off")
    drawing.tight_layout()
    return drawing


def write_page(path: Path, results: Sequence[Result], environment: dict[str, str]) -> Path:
    """Write the demo's HTML report to ``path``, and return it."""
    job = results[0].job
    groups = _by_method(results)
    rates = ", ".join(f"{METHODS[key].label} {own[0].job.rate:g}" for key, own in groups.items())
    blocks = [
        report.paragraph(
            f"The same small convolutional network learns to read a digit among clutter, {job.batch} images "
            f"a step, with one normalization after the other. Mean ± standard deviation over "
            f"{_seeds(results)}; a seed fixes the initial weights and the order of the images, alike for all "
            "methods."
        ),
        report.table(HEADER, summarize(results)),
        report.paragraph(
            f"Accuracy in % on {SCORED_IMAGES} images of the {job.split} split; guessing gives 10. With "
            "running statistics, the averages collected in training normalize; with online statistics, each "
            f"test batch of {job.batch} normalizes itself. GroupNorm keeps none: its two numbers are one."
        ),
        report.heading("Learning curves"),
        report.figure(
            _draw_results(results),
            "Left: training loss, mean over seeds and a band of one standard deviation. Right: accuracy of each seed.",
        ),
        report.heading("What the network sees"),
        report.figure(
            _draw_inputs(job.split, job.data_seed),
            "Images and their labels: scikit-learn's 8x8 digits, scaled and placed among fragments of "
            "others, each image with its own brightness and contrast. No digit serves two splits.",
        ),
        report.heading("How it was made"),
        report.paragraph(
            f"{job.steps} steps of SGD with momentum 0.9, weight decay 0.0001 on weights alone, and a rate "
            "that rises over the first tenth and falls to 0 along a cosine. Highest rates: "
            f"{rates}; those not set by hand are each method's best of one grid on validation images "
            "(docs/results/demo-search.md)."
        ),
        report.command(environment["command"]),
        report.paragraph(
            f"kalmannorm {environment['kalmannorm']}, torch {environment['torch']}, Python "
            f"{environment['python']}, {environment['machine']}; {environment['seconds']} seconds."
        ),
    ]
    return report.write(path, "Learning from two images at a time", blocks)
