"""An experiment's page: one self-contained HTML file, from ``runs.csv`` and ``curves.csv`` alone."""

import base64
import html
import io
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kalmannorm.lab import figures
from kalmannorm.lab.experiments import DEFAULT_FORMS, Experiment, Scale
from kalmannorm.lab.formatting import filled
from kalmannorm.lab.methods import METHODS
from kalmannorm.lab.results import ENVIRONMENT
from kalmannorm.lab.tables import ArmRuns, Runs, conditions, grids, notes, read_runs, summary, verdict_of

# Prefix of the files of figures of variance gaps.
GAPS = "variance-gaps-"
# Metadata that matplotlib writes into an SVG by default.
_METADATA = ("Creator", "Date", "Format", "Type")


def write_page(experiment: Experiment, folder: Path) -> Path:
    """Write ``report.html`` to an experiment's folder, and return its path."""
    runs = read_runs(experiment, folder)
    groups = {title: arms for title, arms in _groups(runs).items() if any(len(arm.curve("loss")) for arm in arms)}
    measured = summary(experiment, runs)
    gaps = sorted(folder.glob(f"{GAPS}*.png"))
    path = folder / "report.html"
    page = render(
        title=experiment.title,
        question=experiment.question,
        verdict=verdict_of(experiment, runs) if experiment.verdict else conditions(experiment, runs),
        grids=[(title, [[_unbroken(row[0]), *row[1:]] for row in rows]) for title, rows in grids(experiment, runs)],
        notes=notes(experiment, runs),
        gaps=[(gap.stem.removeprefix(GAPS), base64.b64encode(gap.read_bytes()).decode()) for gap in gaps],
        curves=[(title, _drawn(curves(runs, arms))) for title, arms in groups.items()],
        search=_drawn(searched) if (searched := _searched(experiment, runs)) else "",
        metric=experiment.metric.replace("_", " "),
        summary=measured if len(measured) > 1 else [],
        is_table=experiment.is_table,
        **_commands(experiment, runs, folder.parent),
    )
    path.write_text(page, encoding="utf-8")
    return path


def render(**content: Any) -> str:
    """Fill in ``page.html``; texts are escaped."""
    return filled(Path(__file__).with_suffix(".html"), **content)


def _drawn(drawing: Figure) -> Markup:
    """A figure as inline SVG. Hovering over a line, or near it, shows its label and fades the other lines."""
    lines = [line for axes in drawing.axes for line in axes.lines]
    for place, line in enumerate(lines):
        line.set_gid(f"line-{place}")
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kalmannorm"}):
        drawing.savefig(buffer, format="svg", bbox_inches="tight", metadata=dict.fromkeys(_METADATA))
    svg = buffer.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])  # HTML does not need them

    def named(found: re.Match[str]) -> str:
        path, label = found[2], html.escape(str(lines[int(found[1])].get_label()))
        near = f'{path} style="fill: none; stroke: transparent; stroke-width: 12"/>'
        return f'<g class="line"><title>{label}</title>{near}{path} style="{found[3]}"/>'

    return Markup(re.sub(r'<g id="line-(\d+)">\s*(<path d="[^"]*" clip-path="[^"]*") style="([^"]*)"/>', named, svg))


def _unbroken(name: str) -> str:
    """A name with no-break spaces, if it is short."""
    return name.replace(" ", "\N{NO-BREAK SPACE}") if len(name) < 20 else name


def _groups(runs: Runs) -> dict[str, list[ArmRuns]]:
    """Arms that share a figure, by the beginning of its caption."""
    groups: dict[str, list[ArmRuns]] = {}
    for arm in runs.arms:
        baseline, column = arm.arm.baseline, f"{arm.column}. " if len(runs.columns) > 1 else ""
        title = f"{baseline} and others. " if baseline else column
        groups.setdefault(title, []).append(arm)
    return groups


def curves(runs: Runs, arms: Sequence[ArmRuns]) -> Figure:
    """Learning curves of the arms, loss and validation scores, mean over seeds."""
    scored = {arm.name: [name for name in runs.scores if len(arm.curve(name))] for arm in arms}
    several = any(scored.values())
    drawing = figures.empty(10 if several else 6, 4.2)
    losses, *others = drawing.subplots(1, 1 + several, squeeze=False)[0]
    for arm, colour in zip(arms, _colours(arms), strict=True):
        loss = arm.curve("loss")
        losses.plot(loss.index, loss, color=colour, label=arm.label if len(arms) > 1 else runs.title(arm))
        for name in scored[arm.name]:
            points = 100 * arm.curve(name)
            # Dashes let an equal curve behind show through.
            style = "--" if name.endswith("online") or name == "mask_ap" else "-"
            marker, label = "." if len(points) < 20 else "", f"{runs.title(arm)}, {name.replace('_', ' ')}"
            others[0].plot(points.index, points, style, color=colour, marker=marker, label=label)
    figures.plain(losses, xlabel="step", ylabel="training loss", ylim=(0, _top(losses)))
    for scores in others:
        figures.plain(scores, xlabel="step", ylabel="validation, %")
    losses.legend(frameon=False, fontsize=9)
    return drawing


def _colours(arms: Sequence[ArmRuns]) -> list[Any]:
    """A colour for each arm: its method's, or another one if an earlier arm has that."""
    found: list[Any] = []
    for place, arm in enumerate(arms):
        method = METHODS.get(arm.arm.config["model"]["init_args"].get("normalization", "bn"))
        fresh = method is not None and method.colour not in found
        found.append(method.colour if method and fresh else mpl.colormaps["tab20"](2 * place % 20 + 1))
    return found


def _top(axes: Axes) -> float | None:
    """Upper limit of the loss axis: at most three times the median, so that an outlier does not flatten the curves."""
    drawn: list[float] = [float(y) for line in axes.lines for y in line.get_ydata()]  # type: ignore[union-attr, arg-type]
    values = sorted(filter(math.isfinite, drawn))
    return min(values[-1], 3 * values[len(values) // 2]) * 1.05 or None if values else None


def _searched(experiment: Experiment, runs: Runs) -> Figure | None:
    """The figure of the search; None unless one numeric setting was searched for at most 12 arms."""
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
    return figures.search(points, dict(zip(points, _colours(arms), strict=True)), runs.short(setting))


def _commands(experiment: Experiment, runs: Runs, output: Path) -> dict[str, Any]:
    """The command, each arm's command, notes and configuration, and the environment."""
    scale = runs.rows[0]["scale"]
    amount: Scale = "tiny" if scale == "tiny" else float(scale)
    seeds = max(len(arm.final) for arm in runs.arms)
    words = ["kalmannorm", "run", experiment.source, *(["--scale", scale] if scale != "1" else [])]
    words += ["--seeds", str(seeds)] if seeds not in (0, experiment.seeds) else []
    forms = dict.fromkeys(own.arm.form for own in runs.arms if own.arm.form)
    words += [] if set(forms) <= set(DEFAULT_FORMS) else ["--kalman", ",".join(forms)]
    command = shlex.join([*words, *(["--output", str(output)] if output != Path("runs") else [])])

    def arms() -> Iterator[dict[str, Any]]:
        for own in runs.arms:
            shared = own.arm.run != (experiment.name, own.name)
            yield {
                "title": f"{own.name}: {runs.title(own)}",
                "command": f"{command} --only '{own.name}'",
                "notes": [*([f"The training of {'/'.join(own.arm.run)}."] if shared else []), *own.arm.notes],
                "config": yaml.safe_dump(own.arm.scaled(amount), sort_keys=False),
            }

    first = next((row for row in runs.rows if row.get("torch")), {})
    environment = [f"{name} {first[name]}" for name in ENVIRONMENT if first.get(name)]
    return {"command": command, "arms": list(arms()), "environment": ", ".join(environment)}
