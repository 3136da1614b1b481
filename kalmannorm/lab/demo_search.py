"""How the demo's rates and schedule were chosen: ``python -m kalmannorm.lab.demo_search``.

The same search for every method, on validation images alone, with seeds that the demo does not use. First a
grid of rates, falling along a cosine; then, at each method's best rate and at the next higher one, the same
with a warm-up. BatchNorm with 128 images a step, warmed up too, is there for reference: it sees as many
images, and its batch statistics are sound, but it takes few steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from kalmannorm.lab import runs
from kalmannorm.lab.runs import Job, Result, run_all, write_csv

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
SEEDS = (100, 101)
REFERENCE_RATES = (0.03, 0.1, 0.3)


def best(results: Sequence[Result], method: str) -> float:
    """The best rate of ``method``: by the mean over seeds of both accuracies."""
    scores: dict[float, float] = {}
    for result in results:
        if result.job.method == method:
            both = result.accuracy_running + result.accuracy_online
            scores[result.job.rate] = scores.get(result.job.rate, 0.0) + both
    return max(scores, key=lambda rate: scores[rate])


def jobs(rates: dict[str, Sequence[float]], schedule: Literal["cosine", "warmup"], steps: int) -> list[Job]:
    """A job for each method, rate and seed."""
    return [
        Job(method, seed, steps, rate, schedule=schedule, split="validation")
        for method, some in rates.items()
        for rate in some
        for seed in SEEDS
    ]


def second_round(results: Sequence[Result], steps: int) -> list[Job]:
    """What to run after the grid: the warm-up near each method's best rate, and the reference."""
    rates: dict[str, Sequence[float]] = {}
    for method in runs.RATES:
        place = RATES.index(best(results, method))
        rates[method] = RATES[place : place + 2]
    reference = [
        Job("bn", seed, max(1, 2 * steps // 128), rate, batch=128, split="validation")
        for rate in REFERENCE_RATES
        for seed in SEEDS
    ]
    return jobs(rates, "warmup", steps) + reference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Search the demo's settings on validation images.")
    parser.add_argument("--output", type=Path, default=Path("docs/results/demo-search.csv"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    console = Console()
    found = run_all(jobs(dict.fromkeys(runs.RATES, RATES), "cosine", options.steps), options.workers, console)
    write_csv(options.output, found)
    found += run_all(second_round(found, options.steps), options.workers, console)
    write_csv(options.output, found)
