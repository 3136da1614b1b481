"""Figures from the rows of a CSV; each function returns one, or None if there is nothing to draw."""

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.goals import GOALS, over
from benchmarks.tables import NAMES, extra_a_layer, measured

# Okabe and Ito's colours, with a marker each for readers who cannot tell them apart.
STYLES = {
    "kalman_norm": ("#0072B2", "o"), "kalman_norm_act": ("#56B4E9", "s"), "kalman_norm_monte_carlo": ("#E69F00", "D"),
    "group_norm": ("#009E73", "^"), "sync_batch_norm": ("#D55E00", "v"), "ghost_batch_norm": ("#000000", "P"),
    "batch_norm_loop": ("#8c8c8c", "<"), "kalman_norm_loop": ("#CC79A7", ">"), "to_batchnorm": ("#009E73", "D"),
    "one_by_one": ("#D55E00", "X"), "kalman_norm_standardized": ("#F0E442", "h"),
    "kalman_norm_captured": ("#0072B2", "*"), "batch_norm_captured": ("#444444", "*"),
    "frozen_batch_norm": ("#8c8c8c", "P"),
}  # fmt: skip
GOAL = "#D55E00"
TICKS = (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
MODES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"))


def ratios(rows, kind, title):
    """Ratios to BatchNorm with quartiles, a line for each case and a mark for each method; goals as short bars."""
    cases = [(case, sides) for case, sides in measured(rows, kind)
             if any(row["ratio_to_batch_norm"] is not None for row in sides.values())]  # fmt: skip
    if not cases:
        return None
    figure = Figure(figsize=(9, 1.4 + 0.34 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for height, (_, sides) in enumerate(cases):
        drawn = [method for method in sides if method in STYLES and sides[method]["ratio_to_batch_norm"] is not None]
        for number, method in enumerate(drawn):
            row = sides[method]
            colour, marker = STYLES[method]
            # Shifted, so that marks do not overlap.
            y = height + 0.5 * ((number + 0.5) / len(drawn) - 0.5)
            axes.plot((row["ratio_quartile_1"], row["ratio_quartile_3"]), (y, y), color=colour, lw=1.5, alpha=0.6)
            axes.plot(row["ratio_to_batch_norm"], y, marker, color=colour, ms=5.5)
    marked = mark_goals(axes, [case for case, _ in cases])
    axes.axvline(1, color="#444444", lw=1)
    axes.set_yticks(range(len(cases)), [label(case) for case, _ in cases], fontsize=8)
    axes.set(title=title, xlabel="time / BatchNorm's (1: as fast)", xscale="log", ylim=(len(cases) - 0.4, -0.6))
    plain_ticks(axes.xaxis, axes.get_xlim())
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    present = [method for method in STYLES if any(method in sides for _, sides in cases)]
    for method in present:
        axes.plot([], [], STYLES[method][1], color=STYLES[method][0], ms=5.5, label=NAMES[method])
    if marked:
        axes.plot([], [], "|", color=GOAL, ms=12, mew=2.5, label="goal for KN")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def label(case):
    """A case's name, without its kind."""
    return case.split("/", 1)[1].replace("/", "  ")


def mark_goals(axes, cases):
    """Draw the goals for time ratios to BatchNorm; whether there is one."""
    marked = False
    for goal in GOALS:
        if goal.measure != "ratio_to_batch_norm" or goal.over:
            continue
        for case in goal.cases:
            if case in cases:
                axes.plot(goal.bound, cases.index(case), "|", color=GOAL, ms=17, mew=2.5, zorder=1)
                marked = True
    return marked


def plain_ticks(axis, limits):
    """Plain numbers as ticks of a logarithmic axis, with limits on both sides of 1."""
    low, high = min(limits[0], 0.8), max(limits[1], 1.6)
    axis.axes.set_xlim(low, high) if axis.axis_name == "x" else axis.axes.set_ylim(low, high)
    ticks = (*TICKS, 0.8, 1.2) if high < 3 else TICKS
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))


def growth(rows):
    """The extra time of each layer, and the ratio, against depth, width and batch."""
    chains = [sides for _, sides in measured(rows, "chain") if {"batch_norm", "kalman_norm"} <= set(sides)]
    if not chains:
        return None
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row", sharex="col")
    for column, (name, words) in enumerate((("depth", "layers"), ("channels", "width"), ("batch", "batch"))):
        top, bottom = axes[:, column]
        for number, mode in enumerate(dict.fromkeys(sides["kalman_norm"]["mode"] for sides in chains)):
            colour, marker = MODES[number]
            line = sorted(along(chains, name, mode))
            xs = [x for x, _ in line]
            top.plot(xs, [extra_a_layer(sides) for _, sides in line], marker + "-", color=colour, label=mode)
            values = [sides["kalman_norm"]["ratio_to_batch_norm"] for _, sides in line]
            bottom.plot(xs, values, marker + "-", color=colour, label=mode)
        bottom.axhline(1, color="#444444", lw=1)
        bottom.set_xscale("log", base=2)
        bottom.set_xticks(sorted({sides["kalman_norm"][name] for sides in chains}))
        bottom.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        bottom.set_xlabel(words)
        for axis in (top, bottom):
            axis.grid(color="#dddddd", lw=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("extra µs a layer and step")
    axes[0, 0].set_ylim(bottom=min(0, axes[0, 0].get_ylim()[0]))
    axes[1, 0].set_ylabel("time / BatchNorm's")
    axes[0, 2].legend(frameon=False, fontsize=8)
    figure.suptitle("KN beside BatchNorm in chains of convolution, norm and ReLU")
    return figure


def along(chains, name, mode):
    """Yield the chains in which only this column varies, with its value.

    The other two columns have their most frequent value.
    """
    rows = [sides["kalman_norm"] for sides in chains]
    others = [other for other in ("depth", "channels", "batch") if other != name]
    usual = {other: max({row[other] for row in rows}, key=[row[other] for row in rows].count) for other in others}
    for sides in chains:
        row = sides["kalman_norm"]
        if row["mode"] == mode and all(row[other] == usual[other] for other in others):
            yield row[name], sides


def memory(rows):
    """Peak memory, and memory saved for the backward pass, over BatchNorm's."""
    found = []
    for kind in ("step", "groups"):
        for case, sides in measured(rows, kind):
            ours, theirs = sides.get("kalman_norm"), sides.get("batch_norm")
            if ours and theirs and over(ours["peak_bytes"], theirs["peak_bytes"]) is not None:
                found.append((case, ours, theirs))
    if not found:
        return None
    figure = Figure(figsize=(9, 1.4 + 0.3 * len(found)), layout="constrained")
    axes = figure.subplots()
    columns = {"peak_bytes": ("peak of a step", "#0072B2", "o"), "saved_bytes": ("kept for backward", "#E69F00", "D")}
    for column, (words, colour, marker) in columns.items():
        points = [(over(ours[column], theirs[column]), y) for y, (_, ours, theirs) in enumerate(found)]
        points = [point for point in points if point[0] is not None]
        axes.plot(*zip(*points, strict=True), marker, color=colour, ms=6, label=words) if points else None
    axes.axvline(1, color="#444444", lw=1)
    axes.set_yticks(range(len(found)), [label(case) for case, _, _ in found], fontsize=8)
    axes.set(title="Memory", xlabel="KN's bytes / BatchNorm's", ylim=(len(found) - 0.4, -0.6))
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def of_device(rows):
    """Each figure by its name."""
    drawn = {
        "steps": ratios(rows, "step", "A training step"),
        "layers": ratios(rows, "layer", "The layer alone, with its ReLU, forward and backward"),
        "groups": ratios(rows, "groups", "Statistics of 2 samples in a batch of 128"),
        "growth": growth(rows),
        "memory": memory(rows),
        "inference": ratios(rows, "inference", "Inference"),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}
