"""``kalmannorm layers``: a table of the errors of prior, observation and posterior in a trained network."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

import kalmannorm
from kalmannorm.convert import with_stock_norms
from kalmannorm.lab.formatting import as_markdown
from kalmannorm.lab.results import csv_text, write_atomically
from kalmannorm.lab.run import check_counts
from kalmannorm.lab.scoring import online_logits
from kalmannorm.lab.seen import calls_of, statistics_batches

COLUMNS = ("layer", "estimate", "reference", "mean", "log_ratio", "log_ratio_rms", "variance_gap")


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
            corrected by its running statistics, and print its accuracy.
        output: A CSV file to write as well.
    """
    check_counts(batches=batches, statistics_batch=statistics_batch)
    from kalmannorm.lab.analysis import errors_of  # noqa: PLC0415 - slow, not needed for --help
    from kalmannorm.lab.fitting import load_with_data  # noqa: PLC0415

    module, data = load_with_data(run)
    size = statistics_batch or getattr(module, "statistics_batch", None)
    network: Any = getattr(module, "network", None)
    if network is None or not isinstance(size, int):
        kind = type(module).__name__
        raise ValueError(f"--run: {run} trained a {kind} with statistics_batch={size}, expected a classifier with one")
    console = Console()
    if convert is not None:
        network = kalmannorm.convert(with_stock_norms(network), calibrate=convert == "corrected")
        for line in _accuracies(network, data.val_dataloader(), size):
            console.print(line, highlight=False)
    groups = statistics_batches(data.val_dataloader(), size)
    seen = calls_of(network, islice(groups, batches))
    rows: list[dict[str, Any]] = []
    for error in errors_of(network, seen):
        row = error._asdict()
        if error.reference == "population":
            row["variance_gap"] = _gap(network, error.layer, error.estimate, seen[error.layer])
        rows.append({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, csv_text(rows, list(COLUMNS)))
    table = as_markdown([list(COLUMNS), *([str(row.get(name, "")) for name in COLUMNS] for row in rows)])
    console.print(table, soft_wrap=True, highlight=False, markup=False, end="")


def _accuracies(network: Any, loader: Any, size: int) -> Iterator[str]:
    """Lines of the accuracy in ``eval()``, and by each statistics batch's own statistics."""
    right, seen = {"eval()": 0, f"statistics batches of {size}": 0}, 0
    with torch.no_grad():
        for inputs, labels in loader:
            for name, logits in zip(right, (network(inputs), online_logits(network, inputs, size)), strict=True):
                right[name] += int((logits.argmax(1) == labels).sum())
            seen += labels.numel()
    for name, number in right.items():
        yield f"accuracy by {name}: {100 * number / seen:.1f} % of {seen} validation labels"


def _gap(network: Any, layer: str, estimate: str, calls: Any) -> float:
    running = network.get_submodule(layer).running_var
    moments = [getattr(call, estimate) for call in calls if getattr(call, estimate) is not None]
    total = sum(float((each.var - running).abs().mean()) for each in moments)
    return total / len(moments) / float(running.mean())
