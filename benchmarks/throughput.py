"""Training steps per second on a GPU, from one process and from several at once: ResNet-32, batches of 128 images.

Small networks leave a GPU idle, so a study trains several at a time. This measures the throughput in several
precisions, with and without CUDA's multi-process service.
"""

import argparse
import contextlib
import multiprocessing
import os
import subprocess
import time

import torch
import torch.nn.functional as F

import kalmannorm as kn
from kalmannorm.lab.methods import normalize
from kalmannorm.lab.models.cifar_resnet import CifarResNet

# Method, images a statistics batch, precision, memory format.
ALONE = [
    ("bn", 128, "float32", "channels_last"),
    ("bn", 128, "bfloat16", "channels_last"),
    ("kn", 2, "float32", "channels_last"),
    ("kn", 2, "bfloat16", "channels_last"),
    ("brn", 2, "float32", "channels_last"),
    ("gn", 2, "float32", "channels_last"),
]


@contextlib.contextmanager
def multi_process_service():
    """CUDA's service that runs kernels of several processes at the same time; yields whether it started."""
    os.environ["CUDA_MPS_PIPE_DIRECTORY"] = os.environ["CUDA_MPS_LOG_DIRECTORY"] = "/tmp/mps"
    os.makedirs("/tmp/mps", exist_ok=True)
    try:
        started = subprocess.run(["nvidia-cuda-mps-control", "-d"], check=False, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        started = False
    try:
        yield started
    finally:
        if started:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", check=False, timeout=60)
        for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
            del os.environ[name]


def step_of(method, samples, dtype, layout, device, depth=32):
    """A whole training step, captured on a GPU."""
    torch.manual_seed(0)
    layout = getattr(torch, "contiguous_format" if layout == "contiguous" else layout)
    options = {"kn": {"input_stats": [[0.0] * 3, [0.5] * 3]}, "gn": {"groups": 4}}.get(method, {})
    whole = method == "bn" and samples == 128
    network = CifarResNet(depth)
    network = network if whole else normalize(network, method, statistics_batch=samples, steps=1000, **options)
    network.to(device, memory_format=layout)
    images = torch.randn(128, 3, 32, 32, device=device).contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (128,), device=device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9)

    kn.capture(network)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    for _ in range(6):
        step()
    return step


def rate(step, seconds, device):
    """Steps per second."""
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        for _ in range(5):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        count += 5
    return count / (time.perf_counter() - begun)


def work(place, phases, seconds, device, depth, barrier, found):
    torch.set_num_threads(1)
    for number, (processes, *of) in enumerate(phases):
        step = step_of(*of, device, depth) if place < processes else None
        barrier.wait()
        found.put((number, rate(step, seconds, device) if step else 0.0))
        barrier.wait()


def together(phases, seconds, device, depth):
    """The sum of all processes' steps per second, for each phase."""
    context = multiprocessing.get_context("spawn")
    most = max(phase[0] for phase in phases)
    barrier, found = context.Barrier(most), context.Queue()
    arguments = (phases, seconds, device, depth, barrier, found)
    team = [context.Process(target=work, args=(place, *arguments), daemon=True) for place in range(most)]
    for process in team:
        process.start()
    totals = [0.0] * len(phases)
    for _ in range(most * len(phases)):
        number, steps = found.get(timeout=180)
        totals[number] += steps
    for process in team:
        process.join(30)
    return totals


def main():
    parser = argparse.ArgumentParser("python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--depth", type=int, default=32)
    options = parser.parse_args()
    phases = [(options.processes, "kn", 2, dtype, "channels_last") for dtype in ("float32", "bfloat16")]
    for served in (False, True):
        with multi_process_service() if served else contextlib.nullcontext(None) as started:
            if served and not started:
                print("no multi-process service")
                break
            totals = together(phases, options.seconds, options.device, options.depth)
        for (processes, *of), total in zip(phases, totals, strict=True):
            print(f"{processes} processes, service {served}:", *of, f"{total:.1f} steps/s", flush=True)
    for of in ALONE:
        found = rate(step_of(*of, options.device, options.depth), options.seconds / 2, options.device)
        print("alone:", *of, f"{found:.1f} steps/s", flush=True)


if __name__ == "__main__":
    main()
