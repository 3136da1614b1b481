"""The files of a finished run: writing and reading them."""

import csv
import io
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from filelock import FileLock, Timeout

import kalmannorm
from kalmannorm.lab.experiments import load
from kalmannorm.lab.workers import available_cpus

# The keys of `environment`.
ENVIRONMENT = ("commit", "kalmannorm", "torch", "lightning", "python", "machine", "accelerator", "date")


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        config: The complete configuration.
        seconds: Time of training and validation; ``seconds_per_step`` is the median.
        losses: One for each step.
        validations: Each a dict of ``step`` and the scores at that step.
        environment: See `environment`.
        split: The scored split, ``"test"`` or ``"validation"``; empty in older runs.
    """

    config: dict[str, Any]
    scores: dict[str, float]
    seconds: float
    seconds_per_step: float
    losses: list[float]
    validations: list[dict[str, float]]
    environment: dict[str, str]
    split: str = ""

    @classmethod
    def read(cls, folder: Path) -> Self:
        if not finished(folder):
            raise ValueError(f"{folder} holds no finished run: expected a result.json")
        config = load(folder / "config.yaml")
        try:
            curve, validations = _read_csv(folder / "curve.csv"), _read_csv(folder / "validations.csv")
            summary = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            return cls(config=config, losses=[row["loss"] for row in curve], validations=validations, **summary)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds a run whose files cannot be read ({error}): remove the folder") from error

    @property
    def last_loss(self) -> float:
        """Mean training loss of the last tenth of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])

    def write(self, folder: Path) -> None:
        """Write all files but ``config.yaml``, ``result.json`` last."""
        curve = [{"step": step, "loss": loss} for step, loss in enumerate(self.losses, 1)]
        write_atomically(folder / "curve.csv", csv_text(curve, ["step", "loss"]))
        write_atomically(folder / "validations.csv", csv_text(self.validations, ["step"]))
        names_of_summary = ("split", "scores", "seconds", "seconds_per_step", "environment")
        summary = {name: getattr(self, name) for name in names_of_summary}
        write_atomically(folder / "result.json", json.dumps(summary, indent=1) + "\n")


def finished(folder: Path) -> bool:
    """Whether the folder holds a finished run."""
    return (Path(folder) / "result.json").is_file()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock an experiment's folder; a ValueError if another process trains in it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0, mode=0o666, is_singleton=True):
            yield
    except Timeout as error:
        raise ValueError(f"--output: another process is running {folder.name} in {folder}") from error


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def csv_text(records: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> str:
    """Records as CSV; numbers are the shortest that read back as the same, missing values are empty.

    The columns are ``names``, then the records' other keys, in the order of their first occurrence.
    """
    file = io.StringIO()
    columns = dict.fromkeys([*names, *(name for record in records for name in record)])
    writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"])} for row in rows]


def environment() -> dict[str, str]:
    """The machine, the versions, the commit of a checkout (with "-dirty" if it has changes), and today's date.

    KALMANNORM_COMMIT, if set, is the commit: for a copy of the files without the git history.
    """
    checkout = Path(kalmannorm.__file__).parents[1]
    describe = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = os.environ.get("KALMANNORM_COMMIT", "")
    if not commit and (checkout / ".git").exists():  # an installed package may lie in another project's checkout
        with suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return {
        "commit": commit or "unknown",
        "kalmannorm": kalmannorm.__version__,
        "torch": str(torch.__version__),
        "lightning": version("lightning"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {available_cpus()} CPUs",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "date": datetime.now(UTC).date().isoformat(),
    }
