"""What was tried to make KN's prior better, beside the layer with a single gain: a screen of one seed, on the CPU.

Pre-activation ResNet-14 of half the width, the first 10,000 of 45,000 training images of CIFAR-10, 5 epochs of 78 steps
of 128, statistics batches of 2, rate 0.3 with a warm-up or without; 3,000 validation images. The layer is written out
in torch functions here, so that what a statistic's gradient is can be chosen.

    KALMANNORM_DATA=../shared/data python docs/results/priors/priors.py --only 'calibrated*' --output priors.csv

Variants:

- ``calibrated``: the prior's mean and variance are corrected, a channel each, by moving averages (weight 0.1) of how
  far off they were: a shift in units of the prior's deviation, and the ratio of the second moment about that mean.
- ``calibrated, gradient of 128``: the same forward pass, but the statistics' gradient is BatchNorm's of the whole
  gradient batch: what a device would know that saw all 128 images. Not a method; it tells what the prior's
  gradient costs.
- ``inflated``: the prior's variance times a constant, or a factor a layer that is learned: what ensemble Kalman
  filters do, whose forecasts are too narrow for the same reason (multiplicative covariance inflation).
- ``channel correlations``: the prior's variance of a convolution is w'Rw with a remembered correlation of the input's
  channels, and one number for the correlation of neighbouring pixels.
- ``patch correlations``: the same with the whole correlation matrix of the input's patches.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kalmannorm as kn
from kalmannorm.evaluation import prior_of
from kalmannorm.gaussian import Gaussian
from kalmannorm.kernels.link import Link
from kalmannorm.kernels.rectify import rectified
from kalmannorm.lab.data.augmentation import crop_and_flip, draw_moves, mean_colour, pixel_scaling
from kalmannorm.lab.data.images import load_images
from kalmannorm.lab.methods import normalize
from kalmannorm.lab.models.cifar_resnet import CifarResNet
from kalmannorm.lab.optimization import sgd
from kalmannorm.lab.results import environment
from kalmannorm.lab.scoring import online_logits
from kalmannorm.propagation import attach, is_open, paused
from kalmannorm.rules import deferred as rules

IMAGES, EPOCHS, BATCH, GROUP, RATE = 10_000, 5, 128, 2, 0.3
INPUT = ([0.0] * 3, [0.5] * 3)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "handed on: observed": {"hand_on": 1.0},
    "handed on: gain 0.5": {"hand_on": 0.5},
    "handed on: gain 0.3": {"hand_on": 0.3},
    "handed on: gain 0.7": {"hand_on": 0.7},
    "handed on: remembered": {"remember": 0.1},
    "inflated by 0.5": {"inflate": 0.5},
    "inflated by 1.5": {"inflate": 1.5},
    "inflated by 2": {"inflate": 2.0},
    "inflated by 3": {"inflate": 3.0},
    "inflated, learned from 2": {"inflate": 2.0, "learn": True},
    "calibrated": {"calibrate": 0.1},
    "calibrated, weight 0.01": {"calibrate": 0.01},
    "calibrated, gradient of 128": {"calibrate": 0.1, "whole_gradient": True},
    "channel correlations": {"correlations": "channels"},
    "patch correlations": {"correlations": "patches"},
    "channel correlations, calibrated": {"correlations": "channels", "calibrate": 0.1},
}


class Layer(kn.KalmanNorm2d):
    """The default layer, written out, with a prior that may be calibrated."""

    calibrate: float = 0.0
    whole_gradient = False
    hand_on: float | None = None
    remember: float = 0.0
    inflate: float | None = None
    log_inflation: nn.Parameter | None = None
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, H, W)``."""
        if not self.is_fusing:
            return super().forward(input)
        with paused():
            groups = self._groups(len(input))
            blocks = input.unflatten(0, (groups, -1))
            seen_var, seen_mean = torch.var_mean(blocks, (1, 3, 4), correction=0)
            prior = prior_of(input, groups)
            assert isinstance(prior, Gaussian)
            mean, var = prior.mean, prior.var
            if self.calibrate:
                mean, var = self._calibrated(mean, var, seen_mean.detach(), seen_var.detach())
            if self.log_inflation is not None:
                var = var * self.log_inflation.exp()
            elif self.inflate is not None:
                var = var * self.inflate
            var = var + self.process_variance()
            q = self.kalman_gain(len(input) // groups)
            innovation = seen_mean - mean
            told = Gaussian(mean, var)
            mean = mean + q * innovation
            var = var + q * (seen_var - var) + q * (1 - q) * innovation.square()
            if self.training:
                self._average_moments(mean.detach(), var.detach())
                if self.whole_gradient:
                    all_var, all_mean = torch.var_mean(input, (0, 2, 3), correction=0)
                    mean = mean.detach() + (all_mean - all_mean.detach())
                    var = var.detach() * (all_var / all_var.detach())
            scale = self.weight * torch.rsqrt(var + self.eps)
            shift = self.bias - mean * scale
            y = (blocks * scale[:, None, :, None, None] + shift[:, None, :, None, None]).flatten(0, 1)
            if is_open():
                believed = [t[None] for t in (self.bias, self.weight.square())]
                if self.hand_on is not None:
                    g = self.hand_on
                    better_mean = told.mean + g * innovation
                    better_var = told.var + g * (seen_var - told.var) + g * (1 - g) * innovation.square()
                    believed = [self.bias + (better_mean - mean) * scale, better_var * scale.square()]
                elif self.remember:
                    believed = self._remembered(mean.detach(), var.detach(), seen_mean.detach(), seen_var.detach())
                believed = [t.detach() if self.whole_gradient else t for t in believed]
                attach(y, Gaussian(*(t[:, :, None, None] for t in believed)), self.layer_name)
            return y

    def _remembered(self, mean: Tensor, var: Tensor, seen_mean: Tensor, seen_var: Tensor) -> list[Tensor]:
        if self.training:
            off = (seen_mean - mean) * torch.rsqrt(var + self.eps)
            shift = off.mean(0)
            ratio = ((seen_var + (seen_mean - mean).square()) / (var + self.eps)).mean(0) - shift.square()
            self.calls += 1
            share = max(self.remember, 1 / self.calls)
            if self.calls == 1:
                self.shift, self.ratio = shift, ratio
            self.shift, self.ratio = self.shift.lerp(shift, share), self.ratio.lerp(ratio, share)
        return [(self.bias + self.weight * self.shift)[None], (self.weight.square() * self.ratio)[None]]

    def _calibrated(self, mean: Tensor, var: Tensor, seen_mean: Tensor, seen_var: Tensor) -> tuple[Tensor, Tensor]:
        told = Gaussian(mean.detach(), var.detach().clamp_min(1e-12))
        if self.calls:
            mean, var = mean + self.shift * var.clamp_min(1e-12).sqrt(), var * self.ratio
        else:
            self.shift, self.ratio = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
        if self.training:
            self.calls += 1
            share = max(self.calibrate, 1 / self.calls)
            deviation = told.var.sqrt()
            self.shift = self.shift.lerp(((seen_mean - told.mean) / deviation).mean(0), share)
            about = told.mean + self.shift * deviation
            second = (seen_var + (seen_mean - about).square()).mean(0)
            self.ratio = self.ratio.lerp(second / told.var.mean(0), share)
        return mean, var

    def _average_moments(self, mean: Tensor, var: Tensor) -> None:
        self.running_mean.lerp_(mean.mean(0), self.momentum)
        self.running_var.lerp_(var.mean(0), self.momentum)


class Correlations:
    """What is remembered of a convolution's input, of 16 images every fourth step."""

    def __init__(self, convolution: nn.Conv2d, whole: bool) -> None:
        self.whole, self.calls, self.known = whole, 0, False
        self.patches, self.channels, self.pixels = torch.empty(0), torch.empty(0), torch.empty(0)
        convolution.register_forward_pre_hook(self.see)

    @torch.no_grad()
    def see(self, convolution: nn.Module, inputs: tuple[Tensor]) -> None:
        """Move the averages."""
        assert isinstance(convolution, nn.Conv2d)
        self.calls += 1
        if not convolution.training or (self.calls > 20 and self.calls % 4):
            return
        with torch._C.DisableTorchFunction():
            x = inputs[0].detach()[:16]
            rows = F.unfold(x, convolution.kernel_size, padding=convolution.padding, stride=convolution.stride)
            rows = rows.transpose(0, 1).flatten(1)
            rows = rows - rows.mean(1, keepdim=True)
            inverse = rows.square().mean(1).clamp_min(1e-9).rsqrt()
            now = inverse[:, None] * (rows @ rows.T / rows.shape[1]) * inverse
            taps = math.prod(convolution.kernel_size)
            blocks = now.view(x.shape[1], taps, x.shape[1], taps)
            channels = blocks.diagonal(dim1=1, dim2=3).mean(-1)
            among = blocks.diagonal(dim1=0, dim2=2).sum((0, 1))
            pixels = ((among - taps) / (taps * (taps - 1))).clamp(0, 1).mean()
            share = max(0.05, 1 / self.calls)
            both = (("patches", now), ("channels", channels), ("pixels", pixels))
            for name, newest in both:
                setattr(self, name, getattr(self, name).lerp(newest, share) if self.known else newest)
            self.known = True

    def variance(self, weight: Tensor, var: Tensor) -> Tensor:
        """Of the output, ``(S, C_out)``, for inputs of variance ``(S, C_in)``."""
        wide = weight.flatten(2) * var.clamp_min(1e-12).sqrt()[:, None, :, None]  # (S, out, in, taps)
        if self.whole:
            flat = wide.flatten(2)
            return ((flat @ self.patches) * flat).sum(-1)
        apart = torch.einsum("soik,ij,sojk->so", wide, self.channels, wide)
        sums = wide.sum(-1)
        return (1 - self.pixels) * apart + self.pixels * torch.einsum("soi,ij,soj->so", sums, self.channels, sums)


@contextmanager
def correlated(network: nn.Module, kind: str | None) -> Iterator[None]:
    """Convolutions' rule with remembered correlations."""
    before = rules.link
    if kind is None:
        yield
        return
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    known = {id(module.weight): Correlations(module, kind == "patches") for module in convolutions}

    def link(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Link:
        found = known.get(id(weight))
        if found is None or not found.known:
            return before(mean, var, weight, bias, relu)
        m, v = mean.flatten(1), var.flatten(1)
        m, v = rectified(m, v) if relu else (m, v)
        shape = (len(m), len(weight), 1, 1)
        out = F.linear(m, weight.flatten(2).sum(-1), bias).view(shape), found.variance(weight, v).view(shape)
        return Link(*out, *((m.view_as(mean), v.view_as(var)) if relu else (None, None)))

    rules.link = link
    try:
        yield
    finally:
        rules.link = before


def build(method: str, group: int, options: dict[str, Any]) -> nn.Module:
    """A network with BatchNorm, or with the layers above."""
    network = CifarResNet(14, width=8)
    if method == "bn":
        return normalize(network, "bn", statistics_batch=group)
    network = kn.convert(network, input_stats=INPUT, stats_batch_size=group)
    for layer in network.modules():
        if type(layer) is kn.KalmanNorm2d:
            layer.__class__ = Layer
            layer.calibrate = options.get("calibrate", 0.0)
            layer.hand_on, layer.remember = options.get("hand_on"), options.get("remember", 0.0)
            layer.whole_gradient = options.get("whole_gradient", False)
            layer.inflate = options.get("inflate")
            if options.get("learn"):
                layer.log_inflation = nn.Parameter(torch.full((1,), math.log(options["inflate"])))
    return network


def run(
    name: str, method: str, group: int, options: dict[str, Any], schedule: str, seed: int, rate: float = RATE
) -> dict[str, Any]:
    """Train and score one variant."""
    splits = load_images("cifar10", validation=5000)
    images, labels = (t[:IMAGES] for t in splits.train)
    scaling, border = pixel_scaling(splits.train[0]), mean_colour(images)
    torch.manual_seed(seed)
    network = build(method, group, options)
    steps = EPOCHS * (IMAGES // BATCH)
    made = sgd(network, rate, steps, schedule=schedule, weight_decay=2e-4)  # type: ignore[arg-type]
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    draws = torch.Generator().manual_seed(1000 + seed)
    losses: list[float] = []
    start = time.process_time()
    with correlated(network, options.get("correlations")):
        for _ in range(EPOCHS):
            order, moves = torch.randperm(IMAGES, generator=draws), draw_moves(IMAGES, draws)
            for at in range(0, IMAGES - BATCH + 1, BATCH):
                part = slice(at, at + BATCH)
                batch = scaling(crop_and_flip(images[order[part]], moves[part], border=border))
                loss = F.cross_entropy(network(batch), labels[order[part]])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                losses.append(loss.item())
    score = {}
    network.eval()
    with torch.no_grad():
        for how in ("running", "online"):
            right = 0
            for batch, truth in zip(splits.validation[0][:3000].split(500), splits.validation[1][:3000].split(500),
                                    strict=True):  # fmt: skip
                x = scaling(batch)
                logits = network(x) if how == "running" else online_logits(network, x, group)
                right += int((logits.argmax(1) == truth).sum())
            score[f"validation_{how}"] = right / 3000
    last = losses[-(len(losses) // 8) :]
    return {"variant": name, "statistics_batch": group, "schedule": schedule, "rate": rate, "seed": seed,
            "last_loss": f"{sum(last) / len(last):.4f}", **{k: f"{v:.4f}" for k, v in score.items()},
            "cpu_seconds": f"{time.process_time() - start:.0f}", **environment()}  # fmt: skip


def main() -> None:
    """The variants that were asked for, one after another; rows are added to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*")
    parser.add_argument("--schedule", default="warmup", choices=["warmup", "cosine"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--group", type=int, default=GROUP, help="images normalized together")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plan = [("BatchNorm, 128 images", "bn", BATCH, {}), ("BatchNorm", "bn", GROUP, {})]
    plan += [(name, "kn", given.group, options) for name, options in VARIANTS.items()]
    for name, method, group, options in plan:
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            if fnmatch(name, given.only):
                row = run(name, method, group, options, given.schedule, seed, given.rate)
                new = not given.output.exists()
                with given.output.open("a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(row))
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print(*row.values(), file=sys.stderr)


if __name__ == "__main__":
    main()
