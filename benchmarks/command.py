"""Measure speed and memory of Kalman Normalization, BatchNorm and others, into a CSV.

All sides of a case are in one process and take their steps in turn. A case that fails gets a row with its error, and
the others continue; rows are written as they are measured. `python -m benchmarks.plot` makes tables and figures.
"""

import argparse
import contextlib
import fnmatch
import functools
import gc
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks import memory, rows, timing
from benchmarks.cases import cases
from benchmarks.memory import nothing
from benchmarks.networks import UnavailableError
from benchmarks.steps import COMPILED, step_of

# Maps that a layer and its ReLU must read or write without a cache: forward, read for the statistics, read and write to
# normalize; backward, read input and gradient for the sums, read both and write the result. All methods use this count,
# so that their shares of a copy's speed are comparable.
MAPS_MOVED = 8


def arguments(given=None):
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="the CSV; rows are added to it")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cases by name: 'step/resnet50/*'")
    parser.add_argument("--all", action="store_true", help="every network, batch, mode and type; takes hours")
    parser.add_argument("--tiny", action="store_true", help="a tiny case of every kind, in seconds")
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    parser.add_argument("--steps", type=int, help="rounds of each case; by default the case's own number")
    parser.add_argument("--warm-up", type=int, help="warm-up steps of each side; by default the case's own number")
    parser.add_argument("--seconds", type=float, help="time limit of a case; by default 25 on a CPU, 10 on a GPU")
    parser.add_argument("--backend", default="inductor", help="torch.compile's")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--anew", action="store_true", help="delete the CSV's rows first")
    start.add_argument("--resume", action="store_true", help="skip cases that are in the CSV")
    options = parser.parse_args(given)
    if options.output is None and not options.list:
        parser.error("expected --output, or --list")
    if options.seconds is None:
        options.seconds = 25.0 if options.device == "cpu" else 10.0
    return options


def chosen(options):
    """The cases to measure, in their order.

    Raises:
        ValueError: No case has such a name.
    """
    every = cases(options.device, options.tiny, options.all)
    found = [case for case in every if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in options.only)]
    if not found:
        raise ValueError(f"no case is called {' or '.join(options.only)}; see --list")
    if options.resume and options.output.exists():
        done = {row["case"] for row in rows.read(options.output)}
        found = [case for case in found if case.name not in done]
    return found


def prepare(case, method, options):
    """A side's step after its warm-up, and its compile time and memory."""
    seen = {}
    on_gpu = options.device == "cuda"
    before = allocated() if on_gpu else 0
    step, persistent = step_of(case, method, options.device, options.backend)
    with cold_cache(case, options):
        first = timing.first_seconds(step, options.device)
    if case.mode in COMPILED:
        seen["compile_s"] = first
    for _ in range(case.warm_up if options.warm_up is None else options.warm_up):
        step(nothing)
    if case.kind in ("step", "layer", "groups") and case.mode != "graph":
        if case.mode == "eager":
            seen["saved_bytes"] = memory.saved_bytes(step, persistent())
        if not on_gpu:
            seen["peak_bytes"] = memory.peak_cpu(step, persistent())
        elif not method.endswith("_captured"):  # the allocator does not track the memory in use within a graph
            seen["peak_bytes"] = memory.peak_cuda(step, before)
    return step, seen


def allocated():
    """Bytes allocated on the GPU, after garbage collection."""
    gc.collect()
    return torch.cuda.memory_allocated()


def cold_cache(case, options):
    """An empty cache for torch.compile, warmed up, so that compile times are comparable."""
    if case.mode not in COMPILED:
        return contextlib.nullcontext()
    from torch._inductor.utils import fresh_cache  # noqa: PLC0415  (inductor is slow to import)

    wake_compiler(options.device, options.backend)
    return fresh_cache()


@functools.cache
def wake_compiler(device, backend):
    """Compile a trivial function, as a process's first compilation imports modules and starts workers."""
    x = torch.randn(8, device=device, requires_grad=True)
    torch.compile(lambda x: x.sin().sum(), backend=backend)(x).backward()


def measure(case, options):
    """A row for each method of a case."""
    torch.compiler.reset()
    prepared, found = {}, {}
    load = os.getloadavg()[0]
    for method in case.methods:
        found[method] = {"method": method, "load": load}
        try:
            prepared[method], seen = prepare(case, method, options)
            found[method].update(seen)
        except Exception as error:
            found[method]["error"] = described(error)
            if is_fatal(error):
                break
    if prepared and not any(is_fatal(row.get("error", "")) for row in found.values()):
        try:
            readings = timing.in_turn(prepared, options.steps or case.steps, case.repeats, options.seconds,
                                      case.mode == "graph", options.device)  # fmt: skip
        except Exception as error:
            for method in prepared:
                found[method]["error"] = described(error)
        else:
            for method, taken in readings.items():
                found[method].update(timing.summary(taken, readings.get("batch_norm")), **moved(case, taken, options))
    return [{**rows.of_case(case), **row} for row in found.values()]


def moved(case, taken, options):
    """Memory bandwidth of a layer or a copy; empty for other cases."""
    sizes = {"float32": 4, "bfloat16": 2}
    if case.kind == "copy":
        moved = 2 * case.size * 2**20
    elif case.network == "layer":
        moved = MAPS_MOVED * case.batch * case.channels * case.size**2 * sizes[case.dtype]
    else:
        return {}
    speed = moved / timing.quartiles([reading["step"] for reading in taken])[1] / 1e6
    share = 1.0 if case.kind == "copy" else speed / copy_speed(options.device, options.tiny)
    return {"bytes_moved": moved, "gb_per_s": speed, "share_of_copy": share}


@functools.cache
def copy_speed(device, tiny):
    """GB/s of the device's copy, read and written bytes together, measured once per process."""
    (case,) = (case for case in cases(device, tiny) if case.kind == "copy")
    step, _ = step_of(case, "copy", device)
    readings = timing.in_turn({"copy": step}, 30, device=device)["copy"][5:]
    return 2 * case.size * 2**20 / timing.quartiles([reading["step"] for reading in readings])[1] / 1e6


def described(error):
    """An error's text for the CSV."""
    if isinstance(error, UnavailableError):
        return f"skipped: {error}"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def is_fatal(error):
    """Whether the GPU is unusable in this process from now on."""
    text = str(error)
    return "CUDA error" in text and "out of memory" not in text


def show(found):
    for row in found:
        if row.get("error"):
            print(f"  {row['method']:24} {row['error']}", flush=True)
            continue
        ratio = f"   x {row['ratio_to_batch_norm']:.3f}" if "ratio_to_batch_norm" in row else ""
        extra = f"   compiled in {row['compile_s']:.0f} s" if "compile_s" in row else ""
        extra += f"   {row['gb_per_s']:.3g} GB/s" if "gb_per_s" in row else ""
        extra += f"   {row['peak_bytes'] / 2**20:.3g} MiB" if "peak_bytes" in row else ""
        print(f"  {row['method']:24} {row['median_ms']:10.3f} ms{ratio}{extra}", flush=True)


def main(given=None):
    """Measure; 1 if a case failed (skipped cases did not)."""
    options = arguments(given)
    if options.list:
        print("\n".join(case.name for case in cases(options.device, options.tiny, options.all)))
        return 0
    if options.anew:
        options.output.unlink(missing_ok=True)
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
    failed = False
    machine = rows.machine(options.device)
    start = time.perf_counter()
    for case in chosen(options):
        print(f"{time.perf_counter() - start:6.0f} s  {case.name}", flush=True)
        found = measure(case, options)
        rows.append(options.output, [{**row, **machine} for row in found])
        show(found)
        errors = [row["error"] for row in found if row.get("error")]
        failed |= any(not error.startswith("skipped") for error in errors)
        if any(is_fatal(error) for error in errors):
            continue_in_new_process()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(f"{time.perf_counter() - start:6.0f} s  done: {options.output}", flush=True)
    return int(failed)


def continue_in_new_process():
    """Replace this process by one that measures the remaining cases."""
    given = [word for word in sys.orig_argv[1:] if word not in ("--anew", "--resume")]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *given, "--resume"])
