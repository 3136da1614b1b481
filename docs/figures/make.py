"""Makes the figures of docs/how-it-works.md and of the README, and the table of the paper's Figure 5:
``python docs/figures/make.py [FOLDER]``; about ten seconds on a CPU.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import kalmannorm as kn
from kalmannorm.lab.data.digits import cluttered_digits
from kalmannorm.lab.formatting import as_markdown, format_value
from kalmannorm.lab.models.small import SmallConvNet

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
LAYERS = RESULTS / "layers" / "kn-2.csv"
FIGURE5 = RESULTS / "figure5-cpu"
# Text stays text, in the reader's own font; ids are the same in each run. Narrow figures with large letters: on a
# phone they are shown at half of their width.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kalmannorm",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
# The estimates' colours.
COLOURS = {"prior": "#dd8452", "observation": "#8c8c8c", "posterior": "#4c72b0"}
SIZES = (1, 2, 4, 8, 16, 32, 64)
ALIKE = "#c44e52"
# Rooms of the library on a belief's way, and the functions that say most of it.
ROOMS = ("modules", "recording", "steps", "propagation", "rules", "kernels")
NAMED = ("attach", "relu", "conv", "forward", "exact", "link", "layer")


# -- (a) What a batch shows


class Noise(NamedTuple):
    """How far a batch's moments are from the population's, by batch size; the mean over channels."""

    pixels: int
    """Of an image, in this layer."""
    mean: list[float]
    """Root mean square of the mean's error, in deviations of the population."""
    var: list[float]
    """Root mean square of log(variance / population's)."""
    independent: list[float]
    """What ``mean`` were if the pixels of an image were independent: ``1 / sqrt(images * pixels)``."""
    worth: float
    """How many independent samples one image is worth for the mean."""


def batch_noise(count: int = 1000, draws: int = 400) -> dict[str, Noise]:
    """Noise of the first and of the last layer of the demo's network, at its initial weights.

    Args:
        count: Images, all of which normalize the network together, so that nothing but the choice of a batch varies.
        draws: Batches of each size, drawn with replacement.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = SmallConvNet()
    images, _ = cluttered_digits("train", count)
    seen: list[Tensor] = []
    for norm in network.norms:
        norm.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.no_grad():
        network(images)
    return {name: _noise(x, draws, generator) for name, x in (("first layer", seen[0]), ("last layer", seen[-1]))}


def _noise(x: Tensor, draws: int, generator: torch.Generator) -> Noise:
    x = x.double().flatten(2)
    first, second = x.mean(2), x.square().mean(2)  # of each image
    mean = first.mean(0)
    var = second.mean(0) - mean.square()
    pixels = x.shape[2]
    means, variances = [], []
    for size in SIZES:
        chosen = torch.randint(len(x), (draws, size), generator=generator)
        m = first[chosen].mean(1)
        v = second[chosen].mean(1) - m.square()
        means.append(float(((m - mean).square() / var).mean().sqrt()))
        variances.append(float((v / var).log().square().mean().sqrt()))
    worth = 1 / float(((first - mean).square().mean(0) / var).mean())
    return Noise(pixels, means, variances, [1 / math.sqrt(size * pixels) for size in SIZES], worth)


def draw_noise(noise: dict[str, Noise]) -> Figure:
    """Left the mean, right the variance, a colour a layer."""
    drawing = Figure(figsize=(6, 3.4), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    for colour, (name, found) in zip(("#4c72b0", "#dd8452"), noise.items(), strict=True):
        left.plot(SIZES, found.mean, "o-", color=colour, markersize=4)
        label = f"{name},\n{found.pixels} pixels an image"
        right.plot(SIZES, found.var, "o-", color=colour, markersize=4, label=label)
    first = noise["first layer"]
    label = f"first layer, were its\n{first.pixels} pixels independent"
    left.plot(SIZES, first.independent, ":", color="#4c72b0", label=label)
    for axes, title in ((left, "mean"), (right, "log variance")):
        axes.set(xscale="log", yscale="log", title=title, xlabel="images in a batch", ylim=(0.002, 3))
        axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=9, loc="lower left", handlelength=1.2, borderpad=0)
    left.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    left.set_yticks([], minor=True)
    left.set_ylabel("error, rms")
    return drawing


# -- (b) One update


PRIOR = kn.Gaussian(torch.tensor([[0.0]]), torch.tensor([[1.0]]))
OBSERVATION = kn.functional.observe(torch.tensor([[0.9], [2.1]]))
STRENGTH = 18


def updates() -> dict[int, kn.Gaussian]:
    """The posterior by the number of images that showed the observation, where the prior is worth 18."""
    return {n: kn.functional.kalman_update(PRIOR, OBSERVATION, n / (n + STRENGTH)) for n in (2, 18)}


def draw_update(posteriors: dict[int, kn.Gaussian]) -> Figure:
    """A panel a batch size: three densities."""
    drawing = Figure(figsize=(6, 3), layout="constrained")
    panels = drawing.subplots(1, len(posteriors), sharey=True)
    z = torch.linspace(-3.2, 3.7, 200)
    for axes, (n, posterior) in zip(panels, posteriors.items(), strict=True):
        for name, moments in (("prior", PRIOR), ("observation", OBSERVATION), ("posterior", posterior)):
            axes.plot(z, _density(z, moments), color=COLOURS[name], label=name)
        axes.fill_between(z, _density(z, posterior), color=COLOURS["posterior"], alpha=0.15, linewidth=0)
        axes.set(title=f"{n} images: q = {n / (n + STRENGTH):g}", yticks=[], ylim=(0, 0.85))
        axes.spines["left"].set_visible(False)
    panels[0].legend(fontsize=10, loc="upper left")
    return drawing


def _density(z: Tensor, moments: kn.Gaussian) -> Tensor:
    return torch.distributions.Normal(moments.mean.flatten(), moments.std.flatten()).log_prob(z).exp()


# -- (c) A belief on its way


class Stage(NamedTuple):
    """One channel's values after a function."""

    title: str
    belief: kn.Gaussian
    independent: Tensor
    """Draws with independent pixels and channels, as the rules assume, put through the real functions."""
    smooth: Tensor
    """The same with neighbouring pixels alike, of the same mean and variance."""


def way(side: int = 256, channels: int = 4) -> list[Stage]:
    """A belief through a convolution and a ReLU, and added to a shortcut; and what draws make of it.

    The filter is a blur of each channel, with weights of its own: of what neighbours share it keeps more than the rules
    expect.
    """
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.3, -0.2, 0.5, 0.0]).view(1, channels, 1, 1)
    belief = kn.Gaussian(mean, torch.ones_like(mean))
    shortcut = kn.Gaussian(torch.full((1, 1, 1, 1), 0.4), torch.full((1, 1, 1, 1), 0.3))
    weight = torch.tensor([0.6, -0.5, 0.4, 0.3]).view(1, channels, 1, 1) * torch.full((1, channels, 3, 3), 1 / 3)
    bias = torch.tensor([-1.0])

    def draws(smooth: bool) -> list[Tensor]:
        noise = [torch.randn(1, c, side, side, generator=generator) for c in (channels, 1)]
        x, other = [_smoothed(n) for n in noise] if smooth else noise
        convolved = F.conv2d(mean + x, weight, bias)
        added = F.relu(convolved) + (shortcut.mean + shortcut.std * other)[..., 1:-1, 1:-1]
        return [t.flatten() for t in (convolved, F.relu(convolved), added)]

    rules = kn.rules.RULES
    convolved = rules[F.conv2d](belief, weight, bias)
    rectified = rules[F.relu](convolved)
    beliefs = (convolved, rectified, rules[torch.add](rectified, shortcut))
    titles = ("convolution", "ReLU", "sum with a shortcut")
    return [Stage(*each) for each in zip(titles, beliefs, draws(False), draws(True), strict=True)]


def _smoothed(noise: Tensor) -> Tensor:
    """Neighbouring pixels alike; each channel with mean 0 and variance 1."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel[:, None] * kernel).expand(noise.shape[1], 1, 3, 3)
    x = F.conv2d(F.pad(noise, (1, 1, 1, 1), mode="circular"), kernel, groups=noise.shape[1])
    var, mean = torch.var_mean(x, (2, 3), keepdim=True)
    return (x - mean) / var.sqrt()


def draw_way(stages: list[Stage]) -> Figure:
    """A row a function: histograms of the draws; above them mean and deviation, believed and drawn."""
    drawing = Figure(figsize=(5, 6), layout="constrained")
    for axes, stage in zip(drawing.subplots(3, 1, sharex=True), stages, strict=True):
        bins = torch.linspace(-4, 4, 65).tolist()
        axes.hist(stage.independent.numpy(), bins, density=True, histtype="stepfilled", color="#c4c4c4")
        axes.hist(stage.smooth.numpy(), bins, density=True, histtype="step", color=ALIKE, linewidth=1.3)
        rows = (
            (stage.belief.mean, stage.belief.std, COLOURS["prior"], "believed"),
            (stage.independent.mean(), stage.independent.std(), COLOURS["observation"], "drawn, pixels independent"),
            (stage.smooth.mean(), stage.smooth.std(), ALIKE, "drawn, neighbours alike"),
        )
        for row, (mean, deviation, colour, label) in enumerate(rows):
            axes.errorbar([float(mean)], [0.96 - 0.1 * row], xerr=[float(deviation)], fmt="o", color=colour, capsize=3,
                          markersize=4, label=label)  # fmt: skip
        axes.set(title=stage.title, yticks=[], ylim=(0, 1.04), xlim=(-3.5, 3.5))
        axes.spines["left"].set_visible(False)
    drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=10,
                   title="mean ± deviation", title_fontsize=10)  # fmt: skip
    return drawing


# -- (d) A trained network


def by_depth(path: Path = LAYERS) -> dict[str, tuple[list[float], list[float]]]:
    """Of each estimate the squared error of its mean and its variance over the population's, from layer to layer."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in COLOURS}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["reference"] == "population":
                means, ratios = found[row["estimate"]]
                means.append(float(row["mean"]))
                ratios.append(math.exp(float(row["log_ratio"])))
    return found


def draw_depth(found: dict[str, tuple[list[float], list[float]]]) -> Figure:
    """Above the mean, below the variance."""
    drawing = Figure(figsize=(5, 5.4), layout="constrained")
    above, below = drawing.subplots(2, 1, sharex=True)
    for name, (means, ratios) in found.items():
        places = range(1, len(means) + 1)
        above.plot(places, means, "o-", color=COLOURS[name], markersize=4, label=name)
        below.plot(places, ratios, "o-", color=COLOURS[name], markersize=4)
    below.axhline(1, color="#333333", linewidth=0.8)
    above.set(ylabel="squared error of the mean,\nin population variances", ylim=(0, None))
    _decades(below, [0.1, 0.2, 0.5, 1], "variance / population's")
    below.set(xlabel="normalization layer", ylim=(0.07, 1.3), xticks=[1, 4, 7, 10, 13])
    above.legend(fontsize=10, loc="upper left")
    return drawing


# -- (e) A prior before and after


PRIORS = {
    "trained with BatchNorm": {"as predicted": "pretrained", "corrected": "pretrained-corrected"},
    "trained with KN at 2": {"as predicted": "gains-2", "standardized filters": "gains-2-standardized"},
}
PRIOR_COLOURS = {"as predicted": "#c44e52", "corrected": "#4c72b0", "standardized filters": "#55a868"}


def prior_ratios() -> dict[str, dict[str, list[float]]]:
    """Of each network and kind of prior, its variance over the population's, from layer to layer."""
    return {
        network: {kind: by_depth(LAYERS.with_name(f"{name}.csv"))["prior"][1] for kind, name in kinds.items()}
        for network, kinds in PRIORS.items()
    }


def draw_priors(found: dict[str, dict[str, list[float]]]) -> Figure:
    """A panel a network."""
    drawing = Figure(figsize=(6, 3.4), layout="constrained")
    for axes, (network, kinds) in zip(drawing.subplots(1, 2, sharey=True), found.items(), strict=True):
        for kind, ratios in kinds.items():
            places = range(1, len(ratios) + 1)
            axes.plot(places, ratios, "o-", color=PRIOR_COLOURS[kind], markersize=4, label=kind)
        axes.axhline(1, color="#333333", linewidth=0.8)
        axes.set_title(network, fontsize=11)
        axes.set(xlabel="normalization layer", ylim=(0.07, 2.5))
        axes.legend(fontsize=9, loc="upper right")
        _decades(axes, [0.1, 0.2, 0.5, 1, 2], "variance / population's")
        axes.label_outer()
    return drawing


# -- The README's: what small batches do


METHODS = {"bn": ("BatchNorm", "#c44e52"), "kn": ("Kalman Normalization", "#4c72b0")}
TOGETHER = (128, 32, 8, 4, 2, 1)
STANDARDIZED = {"bn": {128: "bn-128-ws"}, "kn": {2: "kn-2-ws", 1: "kn-1-ws-frozen"}}
PROXIED = {"bn": {128: "bn-128-ws-proxy"}, "kn": {2: "kn-2-ws-proxy", 1: "kn-1-ws-proxy-frozen"}}
RIVAL = "gn-2-ws-proxy"


def accuracies(path: Path = RESULTS / "studies" / "batch-sizes-cpu" / "runs.csv") -> dict[str, list[float]]:
    """Test accuracy in per cent with running statistics, a number a seed, by arm of the study."""
    found: dict[str, list[float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["kind"] == "final":
                found.setdefault(row["arm"], []).append(100 * float(row["accuracy_running"]))
    return found


def draw_front(scores: dict[str, list[float]]) -> Figure:
    """Accuracy by images normalized together: BatchNorm, Kalman Normalization, and the strongest rival."""
    drawing = Figure(figsize=(7, 3.8), layout="constrained")
    axes = drawing.subplots()

    def points(arms: dict[int, str], **looks: object) -> None:
        places = [TOGETHER.index(size) for size in arms]
        means = [statistics.fmean(scores[arm]) for arm in arms.values()]
        deviations = [statistics.stdev(scores[arm]) for arm in arms.values()]
        axes.errorbar(places, means, yerr=deviations, capsize=3, markersize=6, **looks)  # type: ignore[arg-type]

    for key, (name, colour) in METHODS.items():
        points({size: f"{key}-{size}" for size in TOGETHER}, fmt="o-", color=colour, label=name)
    for key, (_, colour) in METHODS.items():
        label = {"kn": "squares: standardized filters", "bn": None}[key]
        points(STANDARDIZED[key], fmt="s--", color=colour, markerfacecolor="white", label=label)
        label = {"kn": "triangles: and a proxy", "bn": None}[key]
        points(PROXIED[key], fmt="^", color=colour, markerfacecolor="white", label=label)
    axes.axhline(statistics.fmean(scores[RIVAL]), color="#8c8c8c", linestyle=":",
                 label="GroupNorm with standardized filters and a proxy")  # fmt: skip
    axes.set(xlabel="images normalized together", ylabel="test accuracy in %", ylim=(0, 62), xlim=(-0.2, 5.2))
    axes.set_xticks(range(len(TOGETHER)), [str(size) for size in TOGETHER])
    axes.legend(fontsize=10, loc="lower left")
    return drawing


# -- A table: the paper's Figure 5


def variance_gaps(folder: Path = FIGURE5) -> str:
    """A table of how far the variance that a batch is normalized by is from the running one, over the running one.

    BatchNorm normalizes by the observation, KN by its posterior. Of each run the mean and the median over its layers;
    then mean and deviation over the runs.
    """
    found: dict[str, list[list[float]]] = {}
    for path in sorted(folder.glob("*.csv")):
        arm = path.stem.rpartition("-seed-")[0]
        estimate = "observation" if arm.startswith("bn") else "posterior"
        with path.open(newline="", encoding="utf-8") as file:
            gaps = [
                float(row["variance_gap"])
                for row in csv.DictReader(file)
                if (row["reference"], row["estimate"]) == ("population", estimate)
            ]
        found.setdefault(arm, []).append(gaps)
    rows = [["arm", "layers", "runs", "mean over layers", "median over layers"]]
    for arm, runs in found.items():
        over_layers = ([average(gaps) for gaps in runs] for average in (statistics.fmean, statistics.median))
        shown = [format_value("variance_gap", values) for values in over_layers]
        rows.append([arm, str(len(runs[0])), str(len(runs)), *shown])
    return (
        "# Figure 5 of the paper, of the small Inception\n\nHow far the variance that a batch of 2 is normalized by is "
        "from the running variance, relative to the running variance. BatchNorm (bn-2) normalizes by the batch's, "
        "Kalman Normalization (kn-2) by the posterior's. Mean ± deviation over runs; the runs are those of "
        f"[the study](../studies/inception-cpu/table.md).\n\n{as_markdown(rows)}"
    )


# -- The code's way of a belief


class Call(NamedTuple):
    """A Python function of the library that ran."""

    room: str
    """Its module, or its package."""
    name: str


def calls_between_layers() -> list[Call]:
    """The calls from a layer's output, through a ReLU and a convolution, to the kernel of the next layer."""
    torch.manual_seed(0)
    model = kn.convert(torch.nn.Sequential(
        *[torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)],
        torch.nn.BatchNorm2d(8),
    ))  # fmt: skip
    images, home = torch.randn(2, 3, 16, 16), str(Path(kn.__file__).parent)
    found: list[Call] = []

    def see(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(home) and not code.co_name.startswith(("<", "__init__")):
            found.append(Call(Path(code.co_filename).relative_to(home).parts[0].removesuffix(".py"), code.co_name))

    model(images)  # what is computed once is computed
    sys.setprofile(see)
    try:
        model(images)
    finally:
        sys.setprofile(None)
    found = [call for call in found if call.room in ROOMS[:-1] or call.name == "layer"]
    kernel = Call("kernels", "layer")
    first = found.index(Call("recording", "attach"), found.index(kernel))
    return found[first : found.index(kernel, first) + 1]


def draw_calls(calls: list[Call]) -> Figure:
    """A row for each room, a point for each call; parts and some calls are named."""
    rooms = list(reversed(ROOMS))
    drawing = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = drawing.subplots()
    heights = [rooms.index(call.room) for call in calls]
    axes.plot(heights, ".-", color=COLOURS["prior"], linewidth=0.7, markersize=4, drawstyle="steps-mid")
    for place, (call, height) in enumerate(zip(calls, heights, strict=True)):
        if call.name in NAMED and call not in calls[:place]:
            axes.annotate(call.name, (place, height), (0, 5), textcoords="offset points", fontsize=9, ha="center")
    records = [place for place, call in enumerate(calls) if call.name == "__torch_function__"]
    asks = calls.index(Call("modules", "forward"))
    for start, title in ((*zip(records, ("ReLU", "convolution"), strict=True), (asks, "the next layer"))):
        axes.axvline(start - 0.5, color="#c4c4c4", linewidth=0.8, zorder=0)
        axes.text(start, len(rooms) - 0.35, title, fontsize=10)
    axes.set(xticks=[], yticks=range(len(rooms)), yticklabels=rooms, ylim=(-0.4, len(rooms)),
             xlabel=f"{len(calls)} calls, in their order")  # fmt: skip
    return drawing


def _decades(axes: Axes, ticks: list[float], label: str) -> None:
    axes.set(yscale="log", ylabel=label)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def main(folder: Path = HERE) -> list[Path]:
    """Make all figures.

    Returns:
        Their paths.
    """
    written = []
    with mpl.rc_context(STYLE):
        drawings = {
            "noise": draw_noise(batch_noise()),
            "update": draw_update(updates()),
            "way": draw_way(way()),
            "depth": draw_depth(by_depth()),
            "priors": draw_priors(prior_ratios()),
            "front": draw_front(accuracies()),
            "calls": draw_calls(calls_between_layers()),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawing in drawings.items():
            written.append(folder / f"{name}.svg")
            drawing.savefig(written[-1], metadata={"Date": None})
    return written


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in main(*map(Path, sys.argv[1:2])):
        print(path)
    (FIGURE5 / "table.md").write_text(variance_gaps(), encoding="utf-8")
