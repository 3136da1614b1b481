"""The subcommands ``kalmannorm fit | validate | test | export | list``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

import kalmannorm
from kalmannorm.lab import experiments
from kalmannorm.lab.data.roots import SOURCES
from kalmannorm.lab.formatting import as_markdown
from kalmannorm.lab.methods import METHODS
from kalmannorm.lab.workers import bars
from kalmannorm.traversal import kalman_layers


def fit(
    *,
    config: str,
    output: Path,
    split: Literal["validation", "test"] | None = None,
    longer: bool = False,
    settings: Sequence[str] = (),
) -> None:
    """Train one network and score it; an interrupted run resumes.

    Args:
        config: An arm of an experiment, such as table8/resnet32-kn-bs2, or a file.
        output: Folder for the checkpoint, the curve and the scores.
        split: Images to score at the end: by default test, or validation if the data have no test split.
        longer: Continue the folder's finished run, which has the same configuration but fewer steps.
        settings: Override any setting of the configuration, such as --trainer.max_steps 10.
    """
    chosen = experiments.config_of(config, settings)
    from kalmannorm.lab import fitting  # noqa: PLC0415 - slow, not needed for --help

    shown = fitting.is_first_process()
    progress = bars(Console(stderr=True), shown=shown)
    bar = progress.add_task("steps", total=fitting.steps(chosen, settings))

    def show_step(step: int) -> None:
        progress.start()  # not earlier: an earlier error is printed on a line of its own
        progress.update(bar, completed=step)

    try:
        result = fitting.fit(chosen, output, show_step, settings, split, longer=longer)
    finally:
        if progress.live.is_started:
            progress.stop()
    if shown:
        _show(result.scores)
        print(f"{1000 * result.seconds_per_step:.1f} ms a step; {output}")


def score(*, output: Path, split: Literal["validation", "test"], settings: Sequence[str] = ()) -> None:
    """Score a run's last checkpoint on images of one split.

    Args:
        output: The run's folder.
        split: The images to score.
        settings: Override any setting of its configuration, such as --trainer.accelerator cpu.
    """
    from kalmannorm.lab import fitting  # noqa: PLC0415

    scores = fitting.score(output, split, settings)
    if fitting.is_first_process():
        _show(scores)


def _show(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        print(f"{name} {value:.4f}")


def export(run: Path, file: Path, *, stock: bool = False) -> None:
    """Write the weights of a run's network, and print the code that loads them.

    Args:
        run: The folder of a finished run.
        file: Where to write the state dict, such as model.pt.
        stock: Replace Kalman layers by torch's BatchNorm, which gives the same outputs in eval().
    """
    from kalmannorm.lab import fitting  # noqa: PLC0415
    from kalmannorm.lab.detection import Detector  # noqa: PLC0415

    module: Any = fitting.load(run)
    network, given = module.network, experiments.load(run / "config.yaml")["model"]["init_args"]
    options = given.get("normalization_options") or {}
    if stock:
        if options.get("proxy"):
            raise ValueError(f"--stock: {run} trained with proxy, which torch's BatchNorm does not have")
        if given["normalization"] != "bn" and next(kalman_layers(network), None) is None:
            raise ValueError(f"--stock: {run} trained {given['normalization']}, expected Kalman layers")
        network = kalmannorm.to_batchnorm(network)
    with file.open("wb") as opened:
        torch.save(network.state_dict(), opened)
    built = given["network"]
    module_name, _, name = built["class_path"].rpartition(".")
    arguments = {**(built.get("init_args") or {}), **(built.get("dict_kwargs") or {})}
    # Arguments that are classes, such as `norm_layer`, have their defaults.
    arguments = {key: value for key, value in arguments.items() if not isinstance(value, dict)}
    lines = ["import torch", f"from {module_name} import {name}", f"network = {name}(**{arguments!r})"]
    if not stock and (given["normalization"] != "bn" or options):
        options = {"statistics_batch": given.get("statistics_batch"), **options}
        lines.insert(1, "from kalmannorm.lab.methods import normalize")
        inputs = ""
        if isinstance(module, Detector):
            lines.insert(1, "from kalmannorm.lab.detection import example")
            inputs = ", inputs=example()"
        lines.append(f"network = normalize(network, {given['normalization']!r}{inputs}, **{options!r})")
    lines.append(f"network.load_state_dict(torch.load({str(file)!r}, weights_only=True))")
    print("\n".join([*lines, "network.eval()"]))


def show() -> None:
    """List experiments with their runs and steps, normalizations and data sets.

    `kalmannorm run NAME --list` shows one experiment's estimated hours on this machine, and its missing data.
    """
    rows = [["experiment", "arms", "runs", "steps", ""]]
    for name in experiments.names():
        found = experiments.read(name)
        arms = [arm for arm in found.arms if arm.form in ("", *experiments.DEFAULT_FORMS)]
        trained = [arm for arm in arms if arm.analysis not in ("parameters", "speed")]
        runs = [(len(arm.points()), int(arm.config["trainer"]["max_steps"])) for arm in trained]
        steps = sum(length * (points * found.search_scale + found.seeds) for points, length in runs)
        count = sum(points + found.seeds for points, _ in runs)
        rows.append([name, str(len(arms)), str(count), f"{steps:,.0f}", found.title])
    methods = [["normalization", ""], *([name, method.label] for name, method in METHODS.items())]
    sets = [*SOURCES, "imagenet", "coco", "pennfudan"]
    print(as_markdown(rows), as_markdown(methods), f"Data sets: {', '.join(sets)}; and folders of images.", sep="\n")
