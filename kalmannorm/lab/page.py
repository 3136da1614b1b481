"""An experiment's page: one self-contained file of HTML, from the files of its runs alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kalmannorm.lab import figures, report
from kalmannorm.lab.experiments import Experiment, Scale
from kalmannorm.lab.methods import METHODS
from kalmannorm.lab.results import ENVIRONMENT
from kalmannorm.lab.tables import ArmRuns, Runs, grids, notes, read_runs, said, summary
from kalmannorm.lab.verdict import verdict_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GAPS", "curves", "write_page"]

# How files of figures of variance gaps begin.
GAPS = "variance-gaps-"
CURVES = (
    "The training loss, mean over seeds and over fiftieths of the run; and on its right, where there are some, the "
    "scores on validation images as training goes on, by running statistics (solid) and by each statistics batch's own "
    "(dashed)."
)
STEPS = (
    "Steps to the baseline's: the first validation at which a run was as good as the baseline is at its end, on the "
    "same validation images; mean over the runs that ever were."
)


def write_page(experiment: Experiment, folder: Path) -> Path:
    """Write ``report.html`` beside ``runs.csv``, and return its path.

    Args:
        experiment: For its words, notes and configurations.
        folder: With the files of runs.
    """
    runs = read_runs(experiment, folder)
    words = verdict_of(experiment, runs) if experiment.verdict else said(experiment, runs)
    blocks = [*([report.paragraph(experiment.question)] if experiment.question else []), report.verdict(words)]
    for title, (header, *rows) in grids(experiment, runs):
        blocks.append(report.table(header, [[_unbroken(row[0]), *row[1:]] for row in rows], title))
    blocks += [report.note(words) for words in notes(experiment, runs)]
    for path in sorted(folder.glob(f"{GAPS}*.png")):
        caption = "|variance of a statistics batch - running variance|: batches to the right, channels downwards"
        blocks.append(report.picture(path.read_bytes(), f"{path.stem.removeprefix(GAPS)}: {caption}"))
    groups = {title: arms for title, arms in _groups(runs).items() if any(len(arm.curve("loss")) for arm in arms)}
    if groups:
        blocks.append(report.heading("Learning curves"))
        blocks += [report.figure(curves(runs, arms), f"{title}{CURVES}") for title, arms in groups.items()]
    if searched := _searched(experiment, runs):
        drawing = figures.search(*searched)
        caption = f"The {experiment.metric.replace('_', ' ')} on validation images, by the setting that is searched."
        blocks += [report.heading("The search"), report.figure(drawing, caption)]
    header, *rows = summary(experiment, runs)
    if rows:
        blocks += [report.heading("All that was measured"), report.table(header, rows)]
        blocks += [report.note(STEPS)] if experiment.is_table else []
    blocks += [report.heading("How it was made"), *_made(experiment, runs)]
    return report.write(folder / "report.html", experiment.title, blocks)


def _unbroken(name: str) -> str:
    """A short name stays on one line."""
    return name.replace(" ", "\N{NO-BREAK SPACE}") if len(name) < 20 else name


def _groups(runs: Runs) -> dict[str, list[ArmRuns]]:
    """Arms that are compared with one another, by the beginning of their figure's caption."""
    groups: dict[str, list[ArmRuns]] = {}
    for arm in runs.arms:
        baseline = arm.arm.baseline if arm.arm else ""
        title = f"{baseline} and others. " if baseline else f"{arm.column}. " if len(runs.columns) > 1 else ""
        groups.setdefault(title, []).append(arm)
    return groups


def curves(runs: Runs, arms: Sequence[ArmRuns]) -> Figure:
    """Loss and scores of the arms' trainings as they went on, mean over seeds."""
    scored = {arm.name: [name for name in runs.scores if len(arm.curve(name))] for arm in arms}
    several = any(scored.values())
    drawing = figures.empty(10 if several else 6, 4.2)
    losses, *others = drawing.subplots(1, 1 + several, squeeze=False)[0]
    for arm, colour in zip(arms, _colours(arms), strict=True):
        loss = arm.curve("loss")
        losses.plot(loss.index, loss, color=colour, label=arm.label if len(arms) > 1 else runs.title(arm))
        for name in scored[arm.name]:
            points = 100 * arm.curve(name)
            # Equal curves hide each other unless the one behind is seen through the other's gaps.
            style = "--" if name.endswith("online") or name == "mask_ap" else "-"
            others[0].plot(points.index, points, style, color=colour, marker="." if len(points) < 20 else "")
    figures.plain(losses, xlabel="step", ylabel="training loss", ylim=(0, _top(losses)))
    for scores in others:
        figures.plain(scores, xlabel="step", ylabel="validation, %")
    losses.legend(frameon=False, fontsize=8)
    return drawing


def _colours(arms: Sequence[ArmRuns]) -> list[Any]:
    """A colour each: the method's, the first time that it comes."""
    from matplotlib import colormaps  # noqa: PLC0415 - slow

    found: list[Any] = []
    for place, arm in enumerate(arms):
        given = arm.arm.config["model"]["init_args"] if arm.arm else {}
        method = METHODS.get(given.get("normalization", "bn"))
        fresh = method is not None and method.colour not in found
        found.append(method.colour if method and fresh else colormaps["tab20"](2 * place % 20 + 1))
    return found


def _top(axes: Axes) -> float | None:
    """Where the axis of losses ends: a curve that shoots up must not flatten the others."""
    drawn: list[float] = [float(y) for line in axes.lines for y in line.get_ydata()]  # type: ignore[union-attr, arg-type]
    values = sorted(filter(math.isfinite, drawn))
    return min(values[-1], 3 * values[len(values) // 2]) * 1.05 or None if values else None


def _searched(
    experiment: Experiment, runs: Runs
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Any], str] | None:
    """Points, colours and the name of the setting, where one setting of numbers is searched and arms are few."""
    arms = [arm for arm in runs.arms if arm.search]
    if len(runs.settings) != 1 or not arms or len(arms) > 12:
        return None
    setting, points = runs.settings[0], {}
    for arm in arms:
        rows = [row for row in arm.search if not row["error"] and row.get(experiment.metric)]
        try:
            points[runs.title(arm)] = [(float(row[setting]), 100 * float(row[experiment.metric])) for row in rows]
        except ValueError:
            return None
    return points, dict(zip(points, _colours(arms), strict=True)), runs.short(setting)


def _made(experiment: Experiment, runs: Runs) -> list[str]:
    """The command, and what each arm is: its notes and its configuration."""
    scale = runs.rows[0]["scale"]
    amount: Scale = "tiny" if scale == "tiny" else float(scale)
    seeds = max(len(arm.final) for arm in runs.arms)
    options = (f" --scale {scale}" if scale != "1" else "") + (f" --seeds {seeds}" if seeds != experiment.seeds else "")
    command = f"kalmannorm run {experiment.name}{options}"
    blocks = [report.command(command)]
    for arm in runs.arms:
        if arm.arm is None:
            continue
        own = [report.command(f"{command} --only '{arm.name}'")]
        if arm.arm.run != (experiment.name, arm.name):
            own.append(report.note(f"The training of {'/'.join(arm.arm.run)}."))
        own += [report.note(text) for text in arm.arm.notes]
        own.append(report.command(yaml.safe_dump(arm.arm.scaled(amount), sort_keys=False)))
        blocks.append(report.details(f"{arm.name}: {runs.title(arm)}", own))
    first = next((row for row in runs.rows if row.get("torch")), {})
    told = [f"{name} {first[name]}" for name in ENVIRONMENT if first.get(name)]
    return [*blocks, *([report.note(", ".join(told))] if told else [])]
