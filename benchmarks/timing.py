"""Time the steps of several sides in turn in one process, by the device's clock."""

import itertools
import statistics
import time

import torch

# A case stops at its time limit, but not before this many rounds.
FEWEST_STEPS = 8
# Before a reading of graphs the GPU idles for 1 ms, so that the CPU can launch them: a training loop, which does not
# wait for each step, hides the launches too.
HEAD_START_CYCLES = 2_000_000


def in_turn(steps, count, repeats=1, seconds=60.0, head_start=False, device="cpu", clock=None):
    """Time the steps of several sides in turn, in reverse order in every other round, so that a side does not always
    follow the same one.

    Args:
        steps: Each side's step, called with ``mark``.
        count: Number of rounds.
        repeats: Steps in each reading.
        seconds: Time limit: no round starts after it, once `FEWEST_STEPS` are done.
        head_start: Let the CPU launch ahead of the GPU, for graphs.
        device: ``cpu`` or ``cuda``.
        clock: Returns seconds; used instead of the device's clock.

    Returns:
        A list of readings for each side: milliseconds of ``step`` and of each part.
    """
    readings = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for number in range(count):
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            if clock is not None and device == "cuda":
                torch.cuda.synchronize()
            if clock is not None or device == "cpu":
                readings[name].append(read_cpu(steps[name], repeats, clock or time.perf_counter))
            else:
                readings[name].append(read_cuda(steps[name], repeats, head_start))
        if number + 1 >= FEWEST_STEPS and time.perf_counter() > end:
            break
    return readings


def read_cpu(step, repeats, clock=time.perf_counter):
    """Milliseconds per step."""
    parts = {}
    start = last = clock()

    def mark(part):
        nonlocal last
        now = clock()
        parts[part] = parts.get(part, 0.0) + 1e3 * (now - last) / repeats
        last = now

    for _ in range(repeats):
        step(mark)
    return {"step": 1e3 * (clock() - start) / repeats, **parts}


def read_cuda(step, repeats, head_start):
    """Milliseconds per step, between events on the GPU, without synchronizing in between."""
    marks = []

    def mark(part):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append((part, event))

    torch.cuda.synchronize()
    if head_start:
        torch.cuda._sleep(HEAD_START_CYCLES)
    mark("start")
    for _ in range(repeats):
        step(mark)
    mark("end")
    torch.cuda.synchronize()
    parts = {}
    for (_, before), (part, after) in itertools.pairwise(marks):
        parts[part] = parts.get(part, 0.0) + before.elapsed_time(after) / repeats
    parts.pop("end")
    return {"step": marks[0][1].elapsed_time(marks[-1][1]) / repeats, **parts}


def first_seconds(step, device):
    """Seconds of the first step, which compiles."""
    start = time.perf_counter()
    step(lambda part: None)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quartiles(values):
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def summary(readings, reference):
    """Medians of a side, and its ratio to the reference.

    The ratio is the median over rounds of the ratio within a round: a temporary slowdown of the machine affects both
    steps of a round and cancels. The ratio of the two medians is recorded too.
    """
    times = [reading["step"] for reading in readings]
    first, median, third = quartiles(times)
    found = {"steps": len(times), "median_ms": median, "quartile_1_ms": first, "quartile_3_ms": third}
    for part in ("forward", "backward", "optimizer"):
        if all(part in reading for reading in readings):
            found[f"{part}_ms"] = statistics.median(reading[part] for reading in readings)
    if reference is not None:
        others = [reading["step"] for reading in reference]
        low, ratio, high = quartiles([a / b for a, b in zip(times, others, strict=True)])
        found.update(ratio_to_batch_norm=ratio, ratio_quartile_1=low, ratio_quartile_3=high,
                     ratio_of_medians=median / statistics.median(others))  # fmt: skip
    return found
