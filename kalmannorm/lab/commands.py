"""The subcommands that train and score one network: ``kalmannorm fit | validate | test``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kalmannorm.lab import fitting
from kalmannorm.lab.recipes import read


def fit(*, config: str, output: Path, settings: Sequence[str] = ()) -> None:
    """Train one network and score it; an interrupted run goes on where it was.

    Args:
        config: A recipe, such as table8/resnet32-kn-bs2, or a file.
        output: Folder for the checkpoint, the curve and the scores.
        settings: Any setting of the configuration in its place, such as --trainer.max_steps 10.
    """
    chosen = read(config).config
    shown = fitting.is_first_process()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown)
    bar = progress.add_task("steps", total=fitting.steps(chosen, settings))

    def tell(step: int) -> None:
        progress.start()  # only now, so that an error before is a line by itself
        progress.update(bar, completed=step)

    try:
        result = fitting.fit(chosen, output, tell, settings)
    finally:
        if progress.live.is_started:
            progress.stop()
    if shown:
        _show(result.scores)
        print(f"{1000 * result.seconds_per_step:.1f} ms a step; {output}")


def on_validation(*, output: Path, settings: Sequence[str] = ()) -> None:
    """Score a run's last checkpoint on validation images.

    Args:
        output: The run's folder.
        settings: Any setting of its configuration in its place, such as --trainer.accelerator cpu.
    """
    _score(output, "validation", settings)


def on_test(*, output: Path, settings: Sequence[str] = ()) -> None:
    """Score a run's last checkpoint on test images.

    Args:
        output: The run's folder.
        settings: Any setting of its configuration in its place, such as --trainer.accelerator cpu.
    """
    _score(output, "test", settings)


def _score(output: Path, split: Literal["validation", "test"], settings: Sequence[str]) -> None:
    scores = fitting.score(output, split, settings)
    if fitting.is_first_process():
        _show(scores)


def _show(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        print(f"{name} {value:.4f}")
