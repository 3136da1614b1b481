"""The cost of a training step: Kalman Normalization over BatchNorm, side by side.

All models of a case live in one process and take their steps in turn, so that whatever else the
machine does meets all of them; the median of many steps is compared, and only ratios are to be
quoted. Run by ``make bench``; writes one row a case and method.
"""

import argparse
import copy
import csv
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import torchvision

import kalmannorm as kn

METHODS = {
    "batch_norm": lambda model: model,
    "kalman_norm": kn.convert,
    "kalman_norm_monte_carlo": lambda model: kn.convert(model, estimator="monte_carlo"),
}


def synchronize(images):
    if images.is_cuda:
        torch.cuda.synchronize()


def seconds_of_steps(models, images, dtype, steps, warm_up):
    """The duration of each step of each model, taken in turn."""
    durations = {name: [] for name in models}
    for step in range(warm_up + steps):
        for name, model in models.items():
            synchronize(images)
            start = time.perf_counter()
            model.zero_grad()
            with torch.autocast(images.device.type, dtype, enabled=dtype is not torch.float32):
                loss = model(images).square().mean()
            loss.backward()
            synchronize(images)
            if step >= warm_up:
                durations[name].append(time.perf_counter() - start)
    return durations


def run_case(network, batch, size, options):
    torch.manual_seed(0)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    stock = getattr(torchvision.models, network)().to(options.device, memory_format=memory_format)
    models = {name: make(copy.deepcopy(stock)).train() for name, make in METHODS.items()}
    images = torch.randn(batch, 3, size, size, device=options.device).to(memory_format=memory_format)
    durations = seconds_of_steps(models, images, getattr(torch, options.dtype), options.steps, options.warm_up)
    medians = {name: statistics.median(d) for name, d in durations.items()}
    for name, seconds in durations.items():
        quartiles = statistics.quantiles(seconds, n=4)
        yield {
            "network": network, "batch": batch, "size": size, "method": name, "steps": options.steps,
            "device": options.device, "dtype": options.dtype, "channels_last": options.channels_last,
            "median_ms": round(1e3 * medians[name], 2), "quartile_1_ms": round(1e3 * quartiles[0], 2),
            "quartile_3_ms": round(1e3 * quartiles[2], 2),
            "ratio_to_batch_norm": round(medians[name] / medians["batch_norm"], 3),
        }  # fmt: skip


def machine():
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor,
        "commit": commit.stdout.strip() or "unknown",
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the CSV to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--cases", nargs="+", default=["resnet18:2:64", "resnet50:2:128"], help="network:batch:size")
    options = parser.parse_args()
    rows = []
    for case in options.cases:
        network, batch, size = case.split(":")
        for row in run_case(network, int(batch), int(size), options):
            rows.append({**row, **machine()})
            times = f"{row['median_ms']:9.1f} ms   x {row['ratio_to_batch_norm']:.2f}"
            print(f"{case:18} {row['method']:24} {times}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
