"""Losses of the first steps of untrained segmentation networks of segmentation_models_pytorch, with Adam.

``python -m benchmarks.first_steps --output docs/results/first-steps.csv`` writes every loss;
``python -m benchmarks.first_steps --summary docs/results/first-steps.csv`` prints the numbers of the documentation.
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kalmannorm as kn
from benchmarks.rows import add
from kalmannorm.lab.baselines.stock import to_groupnorm

NETWORKS: dict[str, Callable[..., nn.Module]] = {"pspnet": smp.PSPNet, "fpn": smp.FPN}
# Normalization and remedy; "" is no remedy.
ARMS = (
    ("kalman_norm", ""), ("batch_norm", ""), ("kalman_norm", "warm-up"), ("group_norm", ""),
    ("kalman_norm", "falling gain"), ("kalman_norm", "calibrate"),
    # Not remedies, but tests of the cause: the decoder gets features without their constant part, or with an added one.
    ("kalman_norm", "centred"), ("batch_norm", "constant added"),
)  # fmt: skip
# "constant": the share of the mean over pixels and images in the power of the encoder's last features.
COLUMNS = ("network", "norm", "remedy", "images", "seed", "step", "loss", "constant")
RATE = 1e-3
WARM_UP, FALLING = 20, 50  # steps
FIRST = 20  # steps within which the loss may jump


def scenes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Standardized images ``(count, 3, size, size)`` of two discs on clouds, and masks ``(count, 1, size, size)``."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    coarse = torch.randn(count, 3, size // 8, size // 8, generator=generator)
    images = F.interpolate(coarse, size=(size, size), mode="bilinear")
    masks = torch.zeros(count, 1, size, size)
    for image, mask in zip(images, masks, strict=True):
        for _ in range(2):
            row, column = torch.randint(size // 5, size - size // 5, (2,), generator=generator).tolist()
            radius = int(torch.randint(size // 10, size // 5, (1,), generator=generator))
            disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
            color = torch.tensor([[1.0], [-1.0], [1.0]]) + 0.3 * torch.randn(3, 1, generator=generator)
            image[:, disc] = 0.3 * image[:, disc] + color
            mask[0, disc] = 1.0
    images = images + 0.2 * torch.randn(images.shape, generator=generator)
    return (images - images.mean()) / images.std(), masks


def build(network: str, norm: str, remedy: str, images: Tensor) -> nn.Module:
    model = NETWORKS[network]("efficientnet-b0", encoder_weights=None)
    if norm == "group_norm":
        return to_groupnorm(model)
    if norm == "kalman_norm":
        model = kn.convert(model)
    if remedy == "calibrate":
        kn.calibrate(model, images[:32], progress=False)
    if remedy == "falling gain":
        kn.anneal(model, 1 / 18)  # a prior is worth one image
    return model


class Features:
    """A forward hook of the encoder that measures its last features, and changes all features for some arms."""

    def __init__(self, remedy: str, seed: int) -> None:
        self.remedy, self.seed, self.constant = remedy, seed, 0.0

    def __call__(self, module: nn.Module, args: object, features: list[Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        features = [self.changed(x, generator) for x in features]
        x = features[-1].detach()
        self.constant = (_mean(x).square().mean() / x.square().mean()).item()
        return features

    def changed(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.remedy == "centred":
            return x - _mean(x)
        if self.remedy == "constant added":  # the same at each step, of twice the features' size
            return x + 2 * x.detach().square().mean().sqrt() * torch.randn(1, x.shape[1], 1, 1, generator=generator)
        return x


def _mean(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3), keepdim=True)


def losses(network: str, norm: str, remedy: str, images: int, seed: int, steps: int,
           size: int) -> Iterator[tuple[float, float]]:  # fmt: skip
    """Yield each step's loss, and the features' constant share."""
    torch.manual_seed(seed)
    inputs, masks = scenes(64, size, seed=100 + seed)
    model = build(network, norm, remedy, inputs).train()
    features = Features(remedy, seed)
    model.get_submodule("encoder").register_forward_hook(features)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if remedy == "warm-up":
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP)
        chosen = torch.randint(len(inputs), (images,), generator=order)
        loss = F.binary_cross_entropy_with_logits(model(inputs[chosen]), masks[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if remedy == "falling gain" and step < FALLING:
            kn.anneal(model, 18 ** (1 / FALLING))
        yield loss.item(), features.constant


def summary(rows: Iterable[dict[str, str]]) -> str:
    """A line for each network, arm and number of images, the mean over seeds."""
    runs: dict[tuple[str, str, str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        key = (row["network"], row["images"], row["norm"], row["remedy"])
        runs.setdefault(key, {}).setdefault(row["seed"], []).append((float(row["loss"]), float(row["constant"])))
    lines = ["network images norm remedy: constant at first; loss at first, largest of steps 2 to 20 (worst seed), "
             "mean of 11 to 20, of the last half"]  # fmt: skip
    for key, seeds in runs.items():
        each = [[loss for loss, _ in run] for run in seeds.values()]
        constant = mean(run[0][1] for run in seeds.values())
        largest = [max(run[1:FIRST]) for run in each]
        soon = mean(mean(run[FIRST // 2 : FIRST] or run) for run in each)
        last = mean(mean(run[len(run) // 2 :]) for run in each)
        lines.append(f"{' '.join(key)}: {constant:.2f}; {mean(run[0] for run in each):.2f}, {mean(largest):.2f} "
                     f"({max(largest):.2f}), {soon:.3f}, {last:.3f}")  # fmt: skip
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.first_steps", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--images", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", type=int, default=list(range(len(ARMS))), help="indices of ARMS")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=96, help="side of the images, in pixels")
    parser.add_argument("--output", type=Path, help="the CSV, to which rows are added")
    parser.add_argument("--summary", type=Path, help="summarize this CSV instead of training")
    options = parser.parse_args(given)
    if options.summary:
        with options.summary.open(newline="") as file:
            print(summary(csv.DictReader(file)))
        return
    torch.set_num_threads(1)
    for arm in options.arms:
        for network in options.networks:
            for images in options.images:
                rows = []
                for seed in options.seeds:
                    found = losses(network, *ARMS[arm], images, seed, options.steps, options.size)
                    cells = (network, *ARMS[arm], images, seed)
                    rows += [dict(zip(COLUMNS, (*cells, step, *(f"{each:.4g}" for each in both)), strict=True))
                             for step, both in enumerate(found, 1)]  # fmt: skip
                text = summary({name: str(cell) for name, cell in row.items()} for row in rows)
                print(text.splitlines()[1], flush=True)
                if options.output:
                    add(options.output, COLUMNS, rows, lineterminator="\n")


if __name__ == "__main__":
    main()
