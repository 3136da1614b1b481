"""``kalmannorm run``: what the command line asks for, checked before anything that is slow to import."""

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from kalmannorm.lab import experiments
from kalmannorm.lab.experiments import FORMS, Arm, Experiment, Scale


def run(
    name: str,
    *,
    only: str = "*",
    kalman: str = "paper,default,standardized",
    scale: str = "1",
    data: Path | None = None,
    weights: Path | None = None,
    seeds: int | None = None,
    devices: int = 1,
    workers: int | None = None,
    output: Path = Path("runs"),
    list: bool = False,
    report: bool = False,
    collect: bool = False,
    grow: bool = False,
) -> int:
    """Run an experiment: a table or a figure of the paper again, or a comparison with a fair search for each arm.

    Searches the settings of each arm alike, where there are some to search, trains each arm from several seeds, and
    compares. What is finished is not trained again, and interrupted runs resume. The files of runs
    and curves keep what they say of arms that were not asked for. Arms whose data are not here are listed as such.
    Where arms start from another experiment's weights, these are trained first, in the same output folder.

    Args:
        name: Such as table8 or batch-sizes-cpu, or a YAML file; `kalmannorm list` shows what there is.
        only: The arms to run, as a pattern or several: 'kn-*,bn-2'.
        kalman: Which forms of Kalman Normalization a table of the paper has rows of, separated by commas: some of
            paper, released, default, standardized.
        scale: A share of the experiment's steps, or tiny: seconds a run, on generated images.
        data: The folder with the data sets, in place of the one that KALMANNORM_DATA names.
        weights: Where arms start from trained weights: the output folder that has them, or a file for all.
        seeds: Trainings of each arm that count, with seeds 0, 1, ..., if not as many as the experiment says.
        devices: Devices a training; with several, trainings run one after another.
        workers: Trainings at the same time, by default as many as there are GPUs, or else CPUs.
        output: Folder for the runs and the tables.
        list: Only say what there is to do, about how long it would take, and what is missing for it.
        report: Only make the table, the figure and the page again, from the files of runs in the output folder.
        collect: Train nothing: tell what has come to an end in the output folder, as of an experiment that was
            interrupted or that ran elsewhere, and what its runs.csv tells of runs whose own folders are gone.
        grow: Trust the output folder's runs.csv for runs whose own folders are gone, for example if only that
            file was kept, and train what it does not tell of: new values of a search, more seeds. Nobody can check that
            these runs were of the same configuration.

    Returns:
        The exit code: 1 where a run failed. One that diverged is a result.
    """
    amount = _checked(scale, devices, workers=workers, seeds=seeds)
    if weights is not None and not weights.exists():
        raise ValueError(f"--weights: expected an output folder, or a file of weights; got {weights}")
    whole = experiments.read(name)
    asked = replace(whole, arms=_chosen(whole, only, kalman, amount), seeds=seeds or whole.seeds)
    experiments.check_search_seed("--seeds", asked)
    from kalmannorm.lab.availability import data_at  # noqa: PLC0415 - slow, and not for --help
    from kalmannorm.lab.trials import Plan, listed, run_experiment  # noqa: PLC0415

    plan = Plan(asked, amount, output, devices, workers, weights, report, collect, grow, Console())
    with data_at(data, [arm.scaled(amount) for arm in asked.arms], output, amount):
        if list:
            print(listed(plan))
            return 0
        return run_experiment(whole, plan)


def _checked(scale: str, devices: int, **others: int | None) -> Scale:
    """The scale that a command line gives, with its counts checked as well."""
    for name, value in {"devices": devices, **others}.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1; got {value}")
    if devices > 1 and (others.get("workers") or 1) > 1:
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


def _chosen(asked: Experiment, only: str, kalman: str, amount: Scale) -> tuple[Arm, ...]:
    """The arms that are asked for, at this scale."""
    forms = [form.strip() for form in kalman.split(",")]
    for form in forms:
        if form not in FORMS:
            raise ValueError(f"--kalman: expected some of {', '.join(FORMS)}; got {form!r}")
    patterns = [pattern.strip() for pattern in only.split(",")]
    there = [arm for arm in asked.arms if not arm.form or arm.form in forms]
    for pattern in patterns:
        if not any(fnmatch(arm.name, pattern) for arm in there):
            arms = ", ".join(arm.name for arm in there)
            raise ValueError(f"--only: no arm of {asked.name} is called {pattern!r}; there are {arms}")
    chosen = [arm for arm in there if any(fnmatch(arm.name, pattern) for pattern in patterns)]
    if amount == "tiny":  # with weights of its own there, an arm starts from nothing
        own = ["weights" in arm.tiny.get("model", {}).get("init_args", {}) for arm in chosen]
        chosen = [replace(arm, start=None) if has else arm for arm, has in zip(chosen, own, strict=True)]
    return tuple(chosen)
