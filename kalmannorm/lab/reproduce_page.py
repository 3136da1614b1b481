"""The page that `reproduce` writes: the table, the learning curves, and how each cell was made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from kalmannorm.lab import report
from kalmannorm.lab.methods import METHODS
from kalmannorm.lab.tables import Cell, Layout, grid, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curves", "write_page"]

SCORES = {"accuracy_running": "-", "accuracy_online": "--", "box_ap": "-", "mask_ap": "--"}


def write_page(
    path: Path, cells: Sequence[Cell], order: Layout, label: str, command: str, others: Sequence[str] = ()
) -> Path:
    """Write the page to ``path``, and return it.

    Args:
        path: Where to.
        cells: With all that was measured.
        order: Of the table.
        label: How long the trainings were, and whether they can be compared with the paper.
        command: What to run to get the page again; a cell's adds ``--only``.
        others: More blocks of HTML, to go in front of the curves.
    """
    header, *rows = grid(cells, order)
    blocks = [
        report.verdict(label),
        # A short name stays on one line.
        report.table(header, [[_unbroken(row[0]), *row[1:]] for row in rows], order.caption),
        report.note("Measured, mean ± standard deviation over seeds; in brackets what the paper reports."),
        *others,
    ]
    trained = [cell for cell in cells if cell.runs]
    if trained:
        blocks.append(report.heading("Learning curves"))
        for name, group in _groups(trained).items():
            blocks.append(report.figure(curves(group), f"{name}: {CURVES}"))
        header, *rows = summary(cells)
        blocks += [report.heading("All that was measured"), report.table(header, rows), report.note(STEPS)]
    problems = [[cell.recipe.name, problem] for cell in cells for problem in cell.problems]
    if problems:
        blocks += [report.heading("What is missing"), report.table(["cell", "why"], problems)]
    blocks += [report.heading("How each cell was made"), report.command(command)]
    blocks += [_made(cell, command) for cell in cells]
    environment = next((run.environment for cell in trained for run in cell.runs.values()), None)
    if environment:
        blocks.append(report.note(", ".join(f"{name} {value}" for name, value in environment.items())))
    return report.write(path, order.title, blocks)


def _unbroken(name: str) -> str:
    return name.replace(" ", "\N{NO-BREAK SPACE}") if len(name) < 20 else name


CURVES = (
    "left, the training loss, mean over seeds; right, the accuracy on validation images as training goes on, with "
    "running statistics (A, solid) and with each statistics batch's own (B, dashed). A curve on the right is only "
    "there where images are held out."
)
STEPS = (
    "Steps to the baseline's: the first validation at which a run was as good as the baseline (BN) is at its end, on "
    "the same validation images."
)


def _groups(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells that are compared with one another: those with the same baseline, by a name for the figure."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(str(cell.recipe.cell.get("baseline", "")), []).append(cell)
    return {(name or "all").rpartition("/")[2]: group for name, group in groups.items()}


def curves(cells: Sequence[Cell]) -> Figure:
    """Loss and scores of the cells' trainings as they went on, mean over seeds."""
    from matplotlib import colormaps  # noqa: PLC0415  (slow to import, and workers never draw)
    from matplotlib.figure import Figure  # noqa: PLC0415

    drawing = Figure(figsize=(10, 4.2), layout="constrained")
    losses, scores = drawing.subplots(1, 2)
    taken: set[str] = set()
    for place, cell in enumerate(cells):
        method = cell.config["model"]["init_args"].get("normalization", "bn")
        colour: Any = METHODS[method].colour
        if colour in taken:
            colour = colormaps["tab20"](2 * place % 20 + 1)
        taken.add(colour)
        runs = list(cell.runs.values())
        steps, mean = _smooth([run.losses for run in runs])
        losses.plot(steps, mean, color=colour, label=cell.recipe.name.partition("/")[2])
        for metric, style in SCORES.items():
            points = [[100 * each.get(metric, math.nan) for each in run.validations] for run in runs]
            if points[0] and not all(map(math.isnan, points[0])):
                at = [each["step"] for each in runs[0].validations]
                scores.plot(at, torch.tensor(points).mean(0).tolist(), style, color=colour)
    losses.set(xlabel="step", ylabel="training loss", ylim=(0, _top(losses)))
    scores.set(xlabel="step", ylabel="validation, %")
    losses.legend(frameon=False, fontsize=8)
    for axes in (losses, scores):
        axes.spines[["top", "right"]].set_visible(False)
    return drawing


def _top(axes: Axes) -> float | None:
    """Where the axis of losses ends: a curve that shoots up must not flatten the others."""
    values = torch.cat([torch.tensor(line.get_ydata()).float() for line in axes.lines]).nan_to_num(0.0)
    return min(float(values.max()), 3 * float(values.median())) * 1.05 or None


def _smooth(losses: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Mean over seeds and over fiftieths of the run; a curve ends where a run diverged."""
    values = torch.tensor(losses)
    window = max(1, values.shape[1] // 50)
    smooth = values.unfold(1, window, window).mean((0, 2))
    steps = (torch.arange(len(smooth)) + 0.5) * window
    return steps.tolist(), torch.where(smooth.isfinite(), smooth, math.nan).tolist()


def _made(cell: Cell, command: str) -> str:
    name = cell.recipe.name.partition("/")[2]
    blocks = [report.command(f"{command} --only {name}")]
    if cell.recipe.run != cell.recipe.name:
        blocks.append(report.note(f"The training of {cell.recipe.run}."))
    blocks += [report.note(note) for note in cell.recipe.notes]
    blocks.append(report.command(yaml.safe_dump(cell.config, sort_keys=False)))
    return report.details(cell.recipe.name, blocks)
