"""Figures of runs and of what the filter does in them; each function returns one to save or to show in a report."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kalmannorm.lab.analysis import PriorError
from kalmannorm.lab.formatting import mean_and_deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["arms", "empty", "plain", "prior_errors", "search", "variance_gaps"]

# The estimates' colours, the same in all figures.
COLOURS = {"prior": "#dd8452", "observation": "#8c8c8c", "posterior": "#4c72b0"}


def empty(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import, and workers never draw)

    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: Axes, **settings: Any) -> None:
    """Axes with these settings, and no frame above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(**settings)


def search(points: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, Any], setting: str) -> Figure:
    """Validation scores by the setting that is searched, a line an arm.

    Args:
        points: For each arm, by its label, pairs of a value of the setting and a score in per cent.
        colours: Of the arms.
        setting: Its name.
    """
    drawing = empty(7, 3.4)
    axes = drawing.subplots()
    for label, pairs in points.items():
        rates, accuracies = [rate for rate, _ in sorted(pairs)], [accuracy for _, accuracy in sorted(pairs)]
        axes.plot(rates, accuracies, "o-", color=colours[label], label=label)
    plain(axes, xlabel=setting, ylabel="validation, %", xscale="log")
    all_rates = sorted({rate for pairs in points.values() for rate, _ in pairs})
    axes.set_xticks(all_rates, [f"{rate:g}" for rate in all_rates])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False)
    return drawing


def arms(scores: Mapping[str, Mapping[str, Sequence[float]]], score_label: str) -> Figure:
    """Mean scores with bars of one standard deviation over seeds.

    With several columns these go from left to right, and each label has a line; with one, each label has a row.

    Args:
        scores: For each label and column, a number a seed; an arm without any is left out.
        score_label: What the scores are, with their unit.
    """
    columns = list(dict.fromkeys(column for own in scores.values() for column in own))
    several = len(columns) > 1
    drawing = empty(7, 3.8 if several else 1.2 + 0.45 * len(scores))
    axes = drawing.subplots()
    for row, (label, own) in enumerate(scores.items()):
        found = {column: mean_and_deviation(values) for column, values in own.items() if len(values)}
        means, spreads = ([pair[place] for pair in found.values()] for place in (0, 1))
        if several:
            # Beside one another, so that bars of equal scores can be told apart.
            offset = 0.06 * (row - (len(scores) - 1) / 2)
            places = [columns.index(column) + offset for column in found]
            axes.errorbar(places, means, spreads, fmt="o-", capsize=3, markersize=5, color=f"C{row % 10}", label=label)
        elif found:
            axes.errorbar(means, [row], xerr=spreads, fmt="o", capsize=3, color=f"C{row % 10}")
    if several:
        plain(axes, ylabel=score_label)
        axes.set_xticks(range(len(columns)), columns)
        axes.legend(frameon=False)
    else:
        plain(axes, xlabel=score_label, ylim=(len(scores) - 0.5, -0.5))
        axes.set_yticks(range(len(scores)), list(scores))
    return drawing


def variance_gaps(gaps: Mapping[str, Mapping[str, Tensor]], layers: Sequence[str] | None = None,
                  at_most: int = 4) -> Figure:  # fmt: skip
    """Heat maps of variance gaps: batches from left to right, channels from top to bottom (Fig. 5).

    Args:
        gaps: For each column, by its title, what `kalmannorm.lab.analysis.variance_gaps` returned.
        layers: A row each; by default at most ``at_most`` that all columns have, from the first to the last.
        at_most: See ``layers``.

    Raises:
        ValueError: The columns have no layer in common.
    """
    from matplotlib.colors import LogNorm  # noqa: PLC0415

    if layers is None:
        layers = _some([name for name in next(iter(gaps.values())) if all(name in c for c in gaps.values())], at_most)
    if not layers:
        raise ValueError(f"variance gaps of {list(gaps)} have no layer in common, so nothing to draw")
    panels = [[column[name] for column in gaps.values()] for name in layers]
    every = torch.cat([panel.flatten() for row in panels for panel in row]).double()
    every = every[every.isfinite() & (every > 0)]
    # One scale for all panels, of four decades: gaps that are nearly zero would stretch it over many.
    high = float(every.max()) if len(every) else 1.0
    low = max(float(every.min()), high / 1e4) if len(every) else high
    scale = LogNorm(low, max(high, low * 1.01))
    drawing = empty(1.6 + 3.6 * len(gaps), 0.9 + 1.7 * len(layers))
    grid = drawing.subplots(len(layers), len(gaps), squeeze=False)
    for row, name in enumerate(layers):
        for column, title in enumerate(gaps):
            axes, panel = grid[row][column], panels[row][column].double()
            image = axes.imshow(panel.clamp_min(low).T.numpy(), aspect="auto", norm=scale, cmap="viridis")
            if row == 0:
                axes.set_title(title)
            if row == len(layers) - 1:
                axes.set_xlabel("batch")
            if column == 0:
                # A name's parts below one another: the panels are low, and names are long.
                axes.set_ylabel("\n".join([*textwrap.wrap(name.replace(".", ". "), 14), "channel"]), fontsize=8)
    drawing.colorbar(image, ax=grid, label="|batch variance - moving variance|")
    return drawing


def _some(names: Sequence[str], count: int) -> list[str]:
    """At most so many of them, evenly from the first to the last."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]


def prior_errors(rows: Sequence[PriorError]) -> Figure:
    """The errors of prior, observation and posterior against the population, layer by layer.

    Left: squared error of the mean, in population variances. Right: log of the variance over the population's,
    its mean over channels and batches as a line, in a band of its deviation.
    """
    rows = [row for row in rows if row.reference == "population"]
    names = list(dict.fromkeys(row.layer for row in rows))
    drawing = empty(10, 4)
    means, ratios = drawing.subplots(1, 2)
    for estimate, colour in COLOURS.items():
        own = [row for row in rows if row.estimate == estimate]
        if not own:
            continue
        places = [names.index(row.layer) for row in own]
        means.plot(places, [row.mean for row in own], "o-", color=colour, label=estimate, markersize=4)
        centre = torch.tensor([row.log_ratio for row in own], dtype=torch.float64)
        rms = torch.tensor([row.log_ratio_rms for row in own], dtype=torch.float64)
        spread = (rms.square() - centre.square()).clamp_min(0).sqrt()
        ratios.plot(places, centre.tolist(), "o-", color=colour, markersize=4)
        ratios.fill_between(places, (centre - spread).tolist(), (centre + spread).tolist(), color=colour, alpha=0.15,
                            linewidth=0)  # fmt: skip
    ratios.axhline(0, color="#333333", linewidth=0.8)
    plain(means, ylabel="squared error of the mean,\npopulation variances", yscale="log")
    plain(ratios, ylabel="log(variance / population's)")
    means.legend(frameon=False)
    for axes in (means, ratios):
        if len(names) <= 20:
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        else:
            axes.set_xlabel("layer, from the first to the last")
    return drawing
