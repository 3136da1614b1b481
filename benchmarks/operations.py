"""Count the torch operations that a training step dispatches for each normalization layer: KN and BatchNorm.

The network is a chain of ten convolutions, norms and ReLUs, so counts are the same on every machine with this torch.
The operations of the convolution and the ReLU are included on both sides.
"""

import argparse
import csv
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kalmannorm as kn

LAYERS = 10


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def chain():
    blocks = ((nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(LAYERS))
    return nn.Sequential(*(module for block in blocks for module in block))


def count(model):
    """Operations for each layer, forward and backward, in the second step."""
    images = torch.randn(2, 16, 8, 8)
    model(images).sum().backward()
    with Counter() as forward:
        loss = model(images).sum()
    with Counter() as backward:
        loss.backward()
    return forward.count / LAYERS, backward.count / LAYERS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the CSV to write")
    options = parser.parse_args()
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "forward_a_layer", "backward_a_layer", "torch"])
        for name, model in (("batch_norm", chain()), ("kalman_norm", kn.convert(chain()))):
            forward, backward = count(model)
            writer.writerow([name, round(forward, 1), round(backward, 1), torch.__version__])
            print(f"{name:12} {forward:6.1f} forward, {backward:6.1f} backward")


if __name__ == "__main__":
    main()
