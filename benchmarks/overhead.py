"""CPU time of a training step, by part of the library: BatchNorm and KN, into a CSV and a page's ``<!-- overhead -->``.

``python -m benchmarks.overhead --output docs/results/speed/overhead.csv --page docs/speed.md``

The time is process time, which other load affects little; on a GPU it is the time of launching kernels. The sides'
steps are timed in turn. Then a signal samples the running code once a millisecond.
"""

import argparse
import csv
import linecache
import math
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.environment import keep_memory

PARTS = {
    "recording": ("recording.py", "priors.py", "steps.py", "watch.py", "checkpoints.py", "shards.py"),
    "evaluation": ("propagation.py", "paper.py", "gaussian.py", "rules/"),
    "layer and link": ("modules.py", "functional.py", "kernels/layer.py", "kernels/link.py", "kernels/autograd.py",
                       "kernels/memory_format.py", "kernels/backends.py", "kernels/rectify.py"),
    "kernels and launches": ("kernels/on_", "kernels/triton_", "kernels/formulas.py", "kernels/moments.py",
                             "kernels/standardize.py"),
}  # fmt: skip
COLUMNS = ("case", "device", "method", "ms", "forward_ms", "backward_ms", "optimizer_ms", "ratio", "network_ms",
           *(f"{part.replace(' ', '_')}_ms" for part in PARTS), "layers", "processor", "threads", "torch", "commit",
           "dirty", "date")  # fmt: skip
HOME = f"{Path(__file__).parent.parent / 'kalmannorm'}/"


def cases():
    """A chain with cheap convolutions, so that other costs show; and a network."""
    from benchmarks.cases import PAIR, Case  # noqa: PLC0415  (after `keep_memory`)

    return {
        "chain": Case("chain", "chain", 2, 8, PAIR, channels=16, depth=16, steps=200),
        "resnet50": Case("step", "resnet50", 2, 64, PAIR, steps=20),
        "tiny": Case("chain", "chain", 2, 4, PAIR, channels=4, depth=1, steps=3),
    }


def part_of(frame):
    """The part of the library that the innermost frame is in; ``network`` if the library only intercepts a call."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(HOME):
            if frame.f_code.co_name == "__torch_function__" and " func(" in linecache.getline(file, frame.f_lineno):
                return "network"
            name = file.removeprefix(HOME)
            return next((part for part, files in PARTS.items() if name.startswith(files)), "network")
        frame = frame.f_back
    return "network"


def shares(step, seconds):
    """Each part's share of a step's time, sampled once per millisecond of process time."""
    import torch  # noqa: PLC0415

    found = Counter()
    before = signal.signal(signal.SIGPROF, lambda _, frame: found.update([part_of(frame)]))
    signal.setitimer(signal.ITIMER_PROF, 1e-3, 1e-3)
    end = time.perf_counter() + seconds
    with torch.autograd.set_multithreading_enabled(False):  # only this thread receives signals
        while time.perf_counter() < end:
            step(lambda part: None)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)
    return {part: number / found.total() for part, number in found.items()}


def measured(case, device, seconds):
    """A row for each method."""
    from torch.nn.modules.batchnorm import _BatchNorm  # noqa: PLC0415

    from benchmarks.networks import build  # noqa: PLC0415
    from benchmarks.steps import step_of  # noqa: PLC0415
    from benchmarks.timing import in_turn, summary  # noqa: PLC0415

    steps = {method: step_of(case, method, device)[0] for method in case.methods}
    readings = in_turn(steps, case.warm_up + case.steps, seconds=math.inf, device=device, clock=time.process_time)
    readings = {method: taken[case.warm_up :] for method, taken in readings.items()}
    layers = sum(isinstance(each, _BatchNorm) for each in build(case).modules())
    for method, step in steps.items():
        found = summary(readings[method], readings[case.methods[0]])
        share = shares(step, seconds)
        parts = {part.replace(" ", "_"): share.get(part, 0.0) for part in ("network", *PARTS)}
        yield {
            "case": case.name, "device": device, "method": method, "ms": found["median_ms"],
            **{f"{part}_ms": found[f"{part}_ms"] for part in ("forward", "backward", "optimizer")},
            "ratio": found["ratio_to_batch_norm"], "layers": layers,
            **{f"{part}_ms": found["median_ms"] * each for part, each in parts.items()},
        }  # fmt: skip


def table(rows):
    """The page's table: both sides of each case, and the time that each layer adds."""
    from benchmarks.tables import NAMES, table  # noqa: PLC0415

    of_parts = [f"{name.replace(' ', '_')}_ms" for name in ("network", *PARTS)]
    columns = ["ms", "forward_ms", "backward_ms", "optimizer_ms", *of_parts]
    lines = []
    for row in rows:
        reference = next(r for r in rows if (r["case"], r["device"]) == (row["case"], row["device"]))
        extra = 1e3 * (float(row["ms"]) - float(reference["ms"])) / float(row["layers"])
        lines.append([row["case"], row["device"], NAMES[row["method"]], *(f"{float(row[c]):.2f}" for c in columns),
                      f"{float(row['ratio']):.2f}", f"{extra:.0f}"])  # fmt: skip
    header = ["case", "device", "", *(c.removesuffix("_ms").replace("_", " ") for c in columns), "ratio", "µs a layer"]
    return table(["step" if name == "ms" else name for name in header], lines)


def main(given=None):
    import torch  # noqa: PLC0415

    from benchmarks.plot import fill  # noqa: PLC0415
    from benchmarks.rows import machine, rounded  # noqa: PLC0415

    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=tuple(cases()), default=["chain", "resnet50"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="sampling time of each side")
    parser.add_argument("--output", type=Path, help="the CSV; new rows replace older ones of the same case and device")
    parser.add_argument("--page", type=Path, help="a Markdown file with the marks, filled from the whole CSV")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    about = machine(options.device)
    rows = []
    for name in options.cases:
        for row in measured(cases()[name], options.device, options.seconds):
            rows.append({n: str(rounded(value)) for n, value in {**about, **row}.items() if n in COLUMNS})
            print("  ".join(f"{n}={rows[-1][n]}" for n in COLUMNS[:14]), flush=True)
    if options.output:
        kept = list(csv.DictReader(options.output.open(newline=""))) if options.output.exists() else []
        new = {(row["case"], row["device"]) for row in rows}
        rows = [*(row for row in kept if (row["case"], row["device"]) not in new), *rows]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if options.page:
        options.page.write_text(fill(options.page.read_text(), "overhead", table(rows)))


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
