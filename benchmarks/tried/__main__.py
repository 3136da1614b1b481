"""Try networks of other packages and situations from public issue threads; write a CSV, and a page made from it.

New rows replace older ones of the same network or situation. Networks whose package is not installed are skipped: they
get a row that says so, or keep the row that the CSV has.
"""

import argparse
import csv
import re
import sys
import time
from pathlib import Path

from benchmarks.environment import keep_memory

COLUMNS = (
    "kind", "library", "name", "samples", "layers", "with_prior", "reasons",
    *(f"{side}_{measure}" for side in ("batchnorm", "kalman")
      for measure in ("first", "last", "largest", "eval", "alone", "recalibrated", "error")),
    "groupnorm_eval",
    "reloaded", "deployed", "in_stock", "measures", "batchnorm", "kalman", "happened", "packages", "seconds",
)  # fmt: skip
SAMPLES = (1, 2)


def rows(only=""):
    """Yield a row for each network and number of samples, and for each situation.

    Args:
        only: A regular expression for library/name; situations have the library ``issues``.
    """
    from benchmarks.tried.networks import NETWORKS  # noqa: PLC0415 - after `keep_memory`
    from benchmarks.tried.situations import SITUATIONS  # noqa: PLC0415

    for library, networks in NETWORKS.items():
        for name, network in networks.items():
            if re.search(only, f"{library}/{name}"):
                yield from _of_network(library, name, network)
    for situation in SITUATIONS:
        if re.search(only, f"issues/{situation.name}"):
            yield _of_situation(situation)


def _of_network(library, name, network):
    from benchmarks.coverage_networks import is_installed  # noqa: PLC0415
    from benchmarks.tried.trial import tried  # noqa: PLC0415

    for samples in SAMPLES:
        row = {"kind": "network", "library": library, "name": name, "samples": samples, "packages": _versions(library)}
        if library != "copied" and not is_installed(library):
            yield {**row, "happened": f"skipped: {library} is not installed"}
            continue
        began = time.perf_counter()
        row |= tried(network, samples)
        yield {**row, "seconds": round(time.perf_counter() - began, 1)}


def _of_situation(situation):
    began = time.perf_counter()
    batchnorm, kalman, happened = situation.make()
    return {
        "kind": "situation", "library": situation.threads, "name": situation.name, "measures": situation.measures,
        "batchnorm": batchnorm, "kalman": kalman, "happened": happened, "packages": _versions("copied"),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _versions(library):
    import importlib.metadata as packages  # noqa: PLC0415

    from benchmarks.coverage_networks import is_installed  # noqa: PLC0415

    names = ["torch", *([library] if library != "copied" and is_installed(library) else [])]
    return ", ".join(f"{name} {packages.version(name)}" for name in names)


def key(row):
    """The columns that identify a row."""
    return row["kind"], row["library"], row["name"], str(row.get("samples", ""))


def read(path):
    """The rows of a CSV, cells as text; an empty list if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{v:.3g}" if isinstance(v, float) else v for name, v in row.items()} for row in found)


def main(given=None):
    """Try and write; 1 if a converted network failed."""
    import torch  # noqa: PLC0415

    from benchmarks.tried.page import page  # noqa: PLC0415

    parser = argparse.ArgumentParser("python -m benchmarks.tried", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results/tried.csv"))
    parser.add_argument("--page", type=Path, default=Path("docs/tried.md"))
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression: 'monai/', 'issues/'")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    found = {key(row): row for row in read(options.output)}
    failed = False
    for row in rows(options.only):
        if not (row.get("happened", "").startswith("skipped") and key(row) in found):
            found[key(row)] = row
        failed |= bool(row.get("kalman_error"))
        print(*(f"{v:.3g}" if isinstance(v, float) else v for v in row.values() if v != ""), sep="  ", flush=True)
        write(options.output, found.values())
    if not found:
        parser.error(f"nothing matches {options.only!r}")
    options.page.write_text(page(read(options.output)))
    return int(failed)


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
