"""The CSV, with a row for each case and method, written as soon as it is measured."""

import csv
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from benchmarks.environment import allocator

CASE = ("case", "kind", "network", "batch", "size", "channels", "depth", "stats_batch", "mode", "dtype",
        "memory_format")  # fmt: skip
MEASURED = ("method", "steps", "repeats", "median_ms", "quartile_1_ms", "quartile_3_ms", "ratio_to_batch_norm",
            "ratio_quartile_1", "ratio_quartile_3", "ratio_of_medians", "forward_ms", "backward_ms", "optimizer_ms",
            "compile_s", "peak_bytes", "saved_bytes", "bytes_moved", "gb_per_s", "share_of_copy", "load",
            "error")  # fmt: skip
MACHINE = ("device", "processor", "threads", "allocator", "torch", "commit", "dirty", "date")
COLUMNS = (*CASE, *MEASURED, *MACHINE)
# Columns that stay text even if they look like a number, as the commit 3e69644 does.
WORDS = {"case", "kind", "network", "mode", "dtype", "memory_format", "method", "error", *MACHINE} - {"threads"}
ROOT = Path(__file__).parent.parent


def of_case(case):
    """A case's own columns."""
    return {"case": case.name, "repeats": case.repeats, **{name: getattr(case, name) for name in CASE[1:]}}


def machine(device):
    """The machine's columns; `KALMANNORM_COMMIT` is the commit of a copy without git history."""
    return {
        "device": device,
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "allocator": allocator(),
        "torch": torch.__version__,
        "commit": os.environ.get("KALMANNORM_COMMIT") or git("rev-parse", "--short", "HEAD") or "unknown",
        # Whether the measured code differs from the commit.
        "dirty": bool(git("status", "--porcelain", "--", "kalmannorm", "benchmarks")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def processor():
    """The processor's name (from /proc/cpuinfo, if there is one) and its number of cores."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def git(*arguments):
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:  # no git
        return ""
    return done.stdout.strip()


def append(path, rows):
    """Add rows, rounded, to a CSV of the benchmarks."""
    add(path, COLUMNS, ({name: rounded(value) for name, value in row.items()} for row in rows))


def add(path, columns, rows, **dialect):
    """Add rows to a CSV, which is created if it is missing.

    Raises:
        ValueError: The CSV has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new and header(path) != columns:
        raise ValueError(f"{path} has other columns than these benchmarks write: move it away, or --anew")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, **dialect)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def header(path):
    with path.open(newline="") as file:
        return tuple(next(csv.reader(file), ()))


def rounded(value):
    """Floats with four digits, more than a timing is accurate to."""
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else (
        round(value) if isinstance(value, float) else value
    )  # fmt: skip


def read(path):
    """The rows, with numbers parsed and empty cells as None.

    If a case and method were measured several times, only the last row is returned, also if it failed.
    """
    with Path(path).open(newline="") as file:
        found = {(row["case"], row["method"]): row for row in csv.DictReader(file)}
    return [{name: value_of(name, text) for name, text in row.items()} for row in found.values()]


def value_of(name, text):
    if not text:
        return None
    if name in WORDS:
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
