"""Profile a case: each side's operators by self time, into a CSV.

``python -m benchmarks.profiling --case step/resnet50/b2/128/eager/float32 --output docs/results/speed/profile.csv``
"""

import argparse
import sys
from pathlib import Path

from benchmarks.environment import keep_memory

MACHINE = ("device", "torch", "commit", "dirty")
COLUMNS = ("case", "method", "operator", "self_ms_a_step", "share", "calls_a_step", *MACHINE)


def operators(case, method, device, steps, warm_up, backend):
    """Each operator's name, self time in milliseconds and calls per step, sorted by time; on a GPU of its kernels."""
    import torch  # noqa: PLC0415  (after `keep_memory`)

    from benchmarks.memory import nothing  # noqa: PLC0415
    from benchmarks.steps import step_of  # noqa: PLC0415

    step, _ = step_of(case, method, device, backend)
    for _ in range(warm_up):
        step(nothing)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step(nothing)
        if device == "cuda":
            torch.cuda.synchronize()
    found = []
    for event in profile.key_averages():
        on_device = "CUDA" in str(event.device_type)
        if on_device != (device == "cuda"):
            continue
        microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
        found.append((event.key, microseconds / 1e3 / steps, event.count / steps))
    return sorted(found, key=lambda line: -line[1])


def main(given=None):
    import torch  # noqa: PLC0415

    from benchmarks.cases import cases  # noqa: PLC0415
    from benchmarks.rows import add, machine  # noqa: PLC0415

    parser = argparse.ArgumentParser("python -m benchmarks.profiling", description=__doc__)
    parser.add_argument("--case", required=True, help="a name from python -m benchmarks --list")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", help="some of the case's; by default all")
    parser.add_argument("--output", type=Path, required=True, help="the CSV; rows are added")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--top", type=int, default=25, help="operators to print for each side")
    parser.add_argument("--backend", default="inductor", help="torch.compile's")
    parser.add_argument("--tiny", action="store_true", help="choose from the cases of python -m benchmarks --tiny")
    options = parser.parse_args(given)
    every = cases(options.device, options.tiny, everything=True)
    case = next((case for case in every if case.name == options.case), None)
    if case is None:
        parser.error(f"no case is called {options.case!r}")
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
    about = {name: value for name, value in machine(options.device).items() if name in MACHINE}
    for method in options.methods or case.methods:
        found = operators(case, method, options.device, options.steps, options.warm_up, options.backend)
        total = sum(milliseconds for _, milliseconds, _ in found)
        print(f"{case.name}  {method}: {total:.2f} ms a step, {sum(n for *_, n in found):.0f} calls")
        for name, milliseconds, calls in found[: options.top]:
            print(f"  {milliseconds:10.3f} ms  {100 * milliseconds / total:5.1f} %  {calls:7.1f} x  {name[:90]}")
            row = {"case": case.name, "method": method, "operator": name, "self_ms_a_step": round(milliseconds, 4),
                   "share": round(milliseconds / total, 4), "calls_a_step": round(calls, 1), **about}  # fmt: skip
            add(options.output, COLUMNS, [row])


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
