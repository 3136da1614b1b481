"""``kalmannorm run``: check the command line before slow imports, then run the experiment."""

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from kalmannorm.lab import experiments
from kalmannorm.lab.experiments import DEFAULT_FORMS, FORMS, Arm, Experiment, Scale


def run(
    name: str,
    *,
    only: str = "*",
    kalman: str = ",".join(DEFAULT_FORMS),
    scale: Scale = 1.0,
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
    """Run an experiment: a table or a figure of the paper, or a comparison with a search for each arm.

    Searches the settings of each arm, trains each arm with its best settings from several seeds, and compares. Finished
    runs are not trained again, and interrupted runs resume. runs.csv and curves.csv keep the rows of arms that this
    call leaves out. Arms whose data are missing are listed. If arms start from another experiment's weights, these are
    trained first, in the same output folder.

    Args:
        name: Such as table8 or batch-sizes-cpu, or a YAML file; `kalmannorm list` shows all.
        only: The arms to run, as one or more patterns: 'kn-*,bn-2'.
        kalman: Forms of Kalman Normalization to run for a table of the paper, separated by commas: some of paper,
            released, default, standardized.
        scale: A share of the experiment's steps, or tiny: seconds a run, on generated images.
        data: The folder with the data sets, in place of KALMANNORM_DATA.
        weights: For arms that start from trained weights: the output folder that has them, or one file for all.
        seeds: Final runs of each arm, with seeds 0, 1, ...; by default as many as the experiment has.
        devices: Devices for each training; with several, trainings run one after another.
        workers: Trainings at the same time; by default the number of GPUs, or else of CPUs.
        output: Folder for the runs and the tables.
        list: Only list the runs, an estimate of their hours, and missing data.
        report: Only make the table, the figure and the page again, from runs.csv and curves.csv in the output folder.
        collect: Train nothing; report the finished runs in the output folder, for example of an interrupted experiment,
            and the rows of its runs.csv whose run folders are gone.
        grow: Trust the rows of the output folder's runs.csv whose run folders are gone, and train only the runs that it
            lacks: new values of a search, more seeds. Their configuration cannot be checked.

    Returns:
        The exit code: 1 if a run failed. A run that diverged is a result.
    """
    check_counts(devices=devices, workers=workers, seeds=seeds)
    if devices > 1 and (workers or 1) > 1:
        raise ValueError("--workers: trainings on several devices run one after another; got both")
    if weights is not None and not weights.exists():
        raise ValueError(f"--weights: expected an output folder, or a file of weights; got {weights}")
    whole = experiments.read(name)
    asked = replace(whole, arms=_chosen(whole, only, kalman, scale), seeds=seeds or whole.seeds)
    experiments.check_search_seed("--seeds", asked)
    from kalmannorm.lab.availability import data_at  # noqa: PLC0415 - slow, not needed for --help
    from kalmannorm.lab.trials import Plan, listed, run_experiment  # noqa: PLC0415

    plan = Plan(asked, scale, output, devices, workers, weights, report, collect, grow, Console())
    with data_at(data, [arm.scaled(scale) for arm in asked.arms], output, scale):
        if list:
            print(listed(plan))
            return 0
        return run_experiment(whole, plan)


def check_counts(**counts: int | None) -> None:
    """Raise a ValueError that names the first of these options that is below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1; got {value}")


def _chosen(asked: Experiment, only: str, kalman: str, scale: Scale) -> tuple[Arm, ...]:
    """The arms that ``--only`` and ``--kalman`` select."""
    forms = [form.strip() for form in kalman.split(",")]
    for form in forms:
        if form not in FORMS:
            raise ValueError(f"--kalman: expected some of {', '.join(FORMS)}; got {form!r}")
    patterns = [pattern.strip() for pattern in only.split(",")]
    available = [arm for arm in asked.arms if not arm.form or arm.form in forms]
    for pattern in patterns:
        if not any(fnmatch(arm.name, pattern) for arm in available):
            arms = ", ".join(arm.name for arm in available)
            raise ValueError(f"--only: no arm of {asked.name} is called {pattern!r}; there are {arms}")
    chosen = [arm for arm in available if any(fnmatch(arm.name, pattern) for pattern in patterns)]
    if scale == "tiny":  # an arm that sets its weights at the tiny scale does not start from another arm's
        sets_weights = ["weights" in arm.tiny.get("model", {}).get("init_args", {}) for arm in chosen]
        chosen = [replace(arm, start=None) if sets else arm for arm, sets in zip(chosen, sets_weights, strict=True)]
    return tuple(chosen)
