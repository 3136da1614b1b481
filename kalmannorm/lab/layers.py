"""``kalmannorm layers``: a table of the errors of prior, observation and posterior in a trained network."""

from itertools import islice
from pathlib import Path
from typing import Literal

from rich.console import Console

import kalmannorm
from kalmannorm.convert import with_stock_norms
from kalmannorm.lab.formatting import as_markdown
from kalmannorm.lab.results import csv_text, write_atomically
from kalmannorm.lab.run import check_counts
from kalmannorm.lab.seen import calls_of, statistics_batches


def layers(
    *,
    run: Path,
    batches: int = 200,
    statistics_batch: int | None = None,
    convert: Literal["corrected", "uncorrected"] | None = None,
    output: Path | None = None,
) -> None:
    """Show how far prior, observation and posterior are from the population, in each layer of a trained network.

    Columns: ``mean``, the squared error of the mean in units of the population's variance; ``log_ratio``, the mean of
    the logarithm of the estimated variance over the population's (below 0: too narrow), and ``log_ratio_rms``; and
    ``variance_gap``, the mean of |variance - running variance| over the mean running variance (Fig. 5).

    Args:
        run: The folder of a finished run of a classifier.
        batches: Number of statistics batches of validation images.
        statistics_batch: Images in each; by default as many as in training.
        convert: First convert a network that was trained with BatchNorm (`kalmannorm.convert`), with or without priors
            corrected by its running statistics, and print its scores.
        output: A CSV file to write as well.
    """
    check_counts(batches=batches, statistics_batch=statistics_batch)
    from kalmannorm.lab.analysis import PriorError, errors_of  # noqa: PLC0415 - slow, not needed for --help
    from kalmannorm.lab.fitting import load_parts, scores_of  # noqa: PLC0415

    trainer, module, data = load_parts(run)
    size = statistics_batch or getattr(module, "statistics_batch", None)
    if not hasattr(module, "network") or not isinstance(size, int):
        kind = type(module).__name__
        raise ValueError(f"--run: {run} trained a {kind} with statistics_batch={size}, expected a classifier with one")
    console = Console()
    if convert is not None:
        module.network = kalmannorm.convert(with_stock_norms(module.network), calibrate=convert == "corrected")
        module.statistics_batch, module.score_online = size, True
        for name, value in scores_of(trainer, module, data, "validation").items():
            console.print(f"{name} {value:.4f}", highlight=False)
    data.setup()
    groups = statistics_batches(data.val_dataloader(), size)
    errors = errors_of(module.network, calls_of(module.network.eval(), islice(groups, batches)))
    rows = [[f"{value:.6g}" if isinstance(value, float) else value or "" for value in error] for error in errors]
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, csv_text([dict(zip(PriorError._fields, row, strict=True)) for row in rows]))
    console.print(as_markdown([PriorError._fields, *rows]), soft_wrap=True, highlight=False, markup=False, end="")
