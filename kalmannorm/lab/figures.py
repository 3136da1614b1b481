"""Figures of runs and of variance gaps; each function returns a Figure."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from kalmannorm.lab.formatting import mean_and_deviation


def empty(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: Axes, **settings: Any) -> None:
    """Apply settings to axes, and remove the frame above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(**settings)


def search(points: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, Any], setting: str) -> Figure:
    """Validation scores by the searched setting, a line for each arm.

    ``points`` maps each arm's label to pairs of a value of the setting and a score in per cent.
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
    """Mean scores for each label and column, with bars of one standard deviation over seeds.

    Several columns go from left to right, with a line for each label; with a single column, each
    label has a row. Arms without scores are left out.
    """
    columns = list(dict.fromkeys(column for own in scores.values() for column in own))
    several = len(columns) > 1
    drawing = empty(7, 3.8 if several else 1.2 + 0.45 * len(scores))
    axes = drawing.subplots()
    for row, (label, own) in enumerate(scores.items()):
        found = {column: mean_and_deviation(values) for column, values in own.items() if len(values)}
        means, spreads = ([pair[place] for pair in found.values()] for place in (0, 1))
        if several:
            # Shifted, so that bars of equal scores do not overlap.
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


def variance_gaps(title: str, gaps: Mapping[str, Tensor], at_most: int = 4) -> Figure:
    """Heat maps of variance gaps: batches from left to right, channels from top to bottom (Fig. 5).

    ``gaps`` is the output of `kalmannorm.lab.analysis.variance_gaps`. At most ``at_most`` layers,
    evenly spaced from the first to the last, have a panel each.
    """
    names, count = list(gaps), min(at_most, len(gaps))
    names = [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]
    every = torch.cat([gaps[name].flatten() for name in names]).double()
    every = every[every.isfinite() & (every > 0)]
    # One scale of at most four decades for all panels: gaps near zero would stretch it.
    high = float(every.max()) if len(every) else 1.0
    low = max(float(every.min()), high / 1e4) if len(every) else high
    scale = LogNorm(low, max(high, low * 1.01))
    drawing = empty(5.2, 0.9 + 1.7 * count)
    panels = drawing.subplots(count, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        panel = gaps[name].double().clamp_min(low).T.numpy()
        image = axes.imshow(panel, aspect="auto", norm=scale, cmap="viridis")
        # Wrapped at dots, since panels are low and names are long.
        axes.set_ylabel("\n".join([*textwrap.wrap(name.replace(".", ". "), 14), "channel"]), fontsize=8)
    panels[0].set_title(title)
    panels[-1].set_xlabel("batch")
    drawing.colorbar(image, ax=panels, label="|batch variance - moving variance|")
    return drawing
