"""How the demo's rates, schedule and width were chosen: ``python -m kalmannorm.lab.demo_search``.

The same search for every method, on validation images alone. First all rates at the default schedule and
width; then, at each method's best rate, the other schedule and a wider network. BatchNorm with 128 images a
step is there for reference: it sees as many images, and its batch statistics are sound.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from kalmannorm.lab.runs import METHODS, Job, Result, run_all, write_csv

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
SEEDS = (100, 101)  # not the demo's
REFERENCE_RATES = (0.03, 0.1, 0.3)


def best(results: Sequence[Result], method: str) -> Job:
    """The first job of ``method`` at its best rate: by the mean over seeds of both accuracies."""
    scores: dict[float, float] = {}
    for result in results:
        if result.job.method == method:
            both = result.accuracy_running + result.accuracy_online
            scores[result.job.rate] = scores.get(result.job.rate, 0.0) + both
    rate = max(scores, key=lambda rate: scores[rate])
    return next(result.job for result in results if (result.job.method, result.job.rate) == (method, rate))


def search(output: Path, methods: Sequence[str], steps: int, workers: int) -> None:
    """Run the search and write a line a run to ``output``."""
    console = Console()
    results: list[Result] = []
    for key in methods:
        grid = [Job(key, seed, steps, rate, split="validation") for rate in RATES for seed in SEEDS]
        results += run_all(grid, workers, console)
        write_csv(output, results)
    chosen = [best(results, key) for key in methods]
    others = [replace(job, **change) for job in chosen for change in ({"schedule": "step"}, {"width": 1.5})]
    if "bn" in methods:
        others += [
            Job("bn", SEEDS[0], max(1, 2 * steps // 128), rate, batch=128, split="validation")
            for rate in REFERENCE_RATES
        ]
    write_csv(output, results + run_all(others, workers, console))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Search the demo's settings on validation images.")
    parser.add_argument("--output", type=Path, default=Path("docs/results/demo-search.csv"))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    search(options.output, options.methods.split(","), options.steps, options.workers)
