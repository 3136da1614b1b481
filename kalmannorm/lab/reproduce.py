"""The paper's tables and figures again: every cell that this machine can run, beside the paper's number."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console

from kalmannorm.lab import report
from kalmannorm.lab.availability import data_at, not_at_hand, with_data
from kalmannorm.lab.computed import COMPUTED, relative_gap, variance_gaps
from kalmannorm.lab.costs import costs
from kalmannorm.lab.recipes import Recipe, Scale, names, read
from kalmannorm.lab.reproduce_page import write_page
from kalmannorm.lab.tables import Cell, as_csv, as_markdown, grid, layout, summary
from kalmannorm.lab.training import quiet
from kalmannorm.lab.trainings import compare_with_baselines, folder_of, train


def reproduce(
    table: str,
    *,
    only: str = "*",
    scale: str = "1",
    data: Path | None = None,
    devices: int = 1,
    workers: int | None = None,
    seeds: int = 3,
    output: Path = Path("runs/reproduce"),
    list: bool = False,
) -> int:
    """Train what a table or a figure of the paper shows, and put the results beside the paper's.

    What is finished is not trained again, and what was interrupted goes on where it was. Cells whose data are not here
    are listed as such.

    Args:
        table: Such as table8 or figure4; anything else lists what there is.
        only: The cells to run, as a pattern: 'resnet32-*'.
        scale: A share of the paper's training steps, or tiny: seconds a cell, on generated images.
        data: The folder with the data sets, in place of the one that KALMANNORM_DATA names.
        devices: Devices a training; with several, trainings run one after another.
        workers: Trainings at the same time, by default as many as there are GPUs, or else CPUs.
        seeds: Trainings of each cell, with seeds 0, 1, ...
        output: Folder for the runs and the tables.
        list: Only say what there is to do, and about how long it would take.

    Returns:
        The exit code: 1 where a run failed. One that diverged is named, and not in the mean.
    """
    amount = checked(scale, devices=devices, workers=workers, seeds=seeds)
    cells = [Cell(recipe, recipe.scaled(amount)) for recipe in _chosen(table, only)]
    quiet()
    with data_at(data, cells, output, amount):
        if list:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as each training would have
            try:
                print(costs(cells, seeds, not_at_hand))
            finally:
                torch.set_num_threads(threads)
            return 0
        ready = with_data(cells)
        folder = output / table
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output: cannot make the folder {folder}: {error.strerror}") from error
        console = Console()
        runs = output / "runs" / (scale if devices == 1 else f"{scale}-{devices}-devices")
        trained = [cell for cell in ready if cell.recipe.cell.get("analysis") not in COMPUTED]
        failed = train(trained, runs, range(seeds), devices, workers, console)
        for cell in ready:
            if cell not in trained:
                cell.computed = COMPUTED[cell.recipe.cell["analysis"]](cell.config)
        compare_with_baselines(trained)
        blocks = _variance_gaps(trained, runs)
    command = f"kalmannorm reproduce {table} --scale {scale} --seeds {seeds}"
    _write(folder, cells, scale, _label(amount, seeds), command, blocks, console)
    return int(failed)


def _write(
    folder: Path, cells: Sequence[Cell], scale: str, label: str, command: str, blocks: Sequence[str], console: Console
) -> None:
    """Write ``results.csv``, ``table.md`` and ``report.html``, and show the table."""
    order = layout(folder.name, cells)
    brackets = " In brackets: the paper." if any(cell.recipe.cell.get("reported") for cell in cells) else ""
    parts = [label, as_markdown(grid(cells, order)), order.caption + brackets]
    problems = "".join(f"- {cell.recipe.name}: {problem}\n" for cell in cells for problem in cell.problems)
    parts += [problems] if problems else []
    (folder / "results.csv").write_text(as_csv(cells, scale), encoding="utf-8")
    more = [as_markdown(summary(cells))] if any(cell.runs for cell in cells) else []
    (folder / "table.md").write_text("\n\n".join([f"# {order.title}", *parts, *more]), encoding="utf-8")
    page = write_page(folder / "report.html", cells, order, label, command, blocks)
    console.print("\n\n".join(parts), soft_wrap=True, highlight=False, markup=False)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)


def checked(scale: str, *, devices: int = 1, **others: int | None) -> Scale:
    """The scale that a command line gives, see `recipes.Recipe.scaled`, with its counts checked as well.

    Args:
        scale: ``"tiny"`` or a share.
        devices: Devices a training.
        others: Numbers that must be at least 1 where they are given, by the names of their options.

    Raises:
        ValueError: One of these is wrong; with its option.
    """
    counts = {"devices": devices, **others}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1; got {value}")
    if devices > 1 and (counts.get("workers") or 1) > 1:
        raise ValueError("--workers: trainings on several devices run one after another; got both")
    if scale == "tiny":
        return "tiny"
    try:
        share = float(scale)
    except ValueError:
        share = 0.0
    if not 0 < share < float("inf"):
        raise ValueError(f"--scale: expected tiny, or a number above 0; got {scale}")
    return share


def _chosen(table: str, only: str) -> list[Recipe]:
    known = names(table)
    chosen = [name for name in known if fnmatch(name, only) or fnmatch(name.partition("/")[2], only)]
    if not chosen:
        cells = ", ".join(name.partition("/")[2] for name in known)
        raise ValueError(f"--only: no cell of {table} is called {only!r}; there are {cells}")
    return [read(name) for name in chosen]


def _label(scale: Scale, seeds: int) -> str:
    trained = f"{seeds} seeds." if seeds > 1 else "1 seed."
    if scale == 1:
        return f"The paper's number of training steps, {trained}"
    how = "a few steps on generated images" if scale == "tiny" else f"{scale:g} of the paper's training steps"
    return f"Scaled down: {how}, {trained} These numbers are not comparable with the paper's."


def _variance_gaps(cells: Sequence[Cell], runs: Path) -> Sequence[str]:
    """Fig. 5 of the cells that ask for it: its number, and the figure as HTML; of the first seed that finished."""
    found = {}
    for cell in cells:
        if cell.recipe.cell.get("analysis") == "variance_gap" and cell.runs:
            gaps, running = variance_gaps(folder_of(runs, cell, min(cell.runs)), cell.config)
            cell.computed["variance_gap"] = relative_gap(gaps, running)
            found[cell.recipe.cell["row"]] = gaps
    if not found:
        return ()
    from kalmannorm.lab.figures import variance_gaps as drawn  # noqa: PLC0415

    caption = "|variance of a statistics batch - running variance|: batches to the right, channels downwards"
    return (report.heading("Variance gaps"), report.figure(drawn(found), caption))
