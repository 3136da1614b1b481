"""The cells of tables that are not a trained network's accuracy: counts, speeds, and what is measured afterwards."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalmannorm.lab.baselines.width import parameter_count
from kalmannorm.lab.costs import build, device, image_size, random_batch, timed_step
from kalmannorm.lab.recipes import merge

__all__ = ["COMPUTED", "parameters", "relative_gap", "speed", "variance_gaps"]

ROUNDS = 20
BATCHES = 1000


def parameters(config: Mapping[str, Any]) -> dict[str, float]:
    """How many parameters the network of a configuration has, in millions (Table 2)."""
    with torch.device("meta"):
        return {"parameters": parameter_count(build(config, "model").network) / 1e6}


def speed(config: Mapping[str, Any], rounds: int = ROUNDS) -> dict[str, float]:
    """Images a second in training on random images, BN and KN in turn, and their ratio (Table 3).

    A step is of one statistics batch, as one device of the paper's takes it. The median of ``rounds`` steps each, after
    two that warm up.
    """
    given = config["model"]["init_args"]
    count, size = given["statistics_batch"], image_size(config)
    assert size is not None
    batch = random_batch(count, size, given["num_classes"])
    modules = {
        name: build(merge(config, {"model": {"init_args": {"normalization": name}}}), "model").to(device()).train()
        for name in ("bn", "kn")
    }
    optimizers = {name: module.configure_optimizers()["optimizer"] for name, module in modules.items()}
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(2 + rounds):
        for name, module in modules.items():
            seconds[name].append(timed_step(module, optimizers[name], batch))
    bn, kn = (statistics.median(seconds[name][2:]) for name in ("bn", "kn"))
    return {"images_per_second_bn": count / bn, "images_per_second_kn": count / kn, "ratio": kn / bn}


# What is computed in place of a training, from a configuration.
COMPUTED: dict[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {"parameters": parameters, "speed": speed}


def variance_gaps(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fig. 5 of a trained network: test images in statistics batches against the running variances.

    Args:
        folder: Of the finished run.
        config: What it was trained by.

    Returns:
        For each layer ``|variance - running variance|``, ``(batches, C)``, and the running variances ``(C,)``.
    """
    from kalmannorm.lab.analysis import variance_gaps as gaps_of  # noqa: PLC0415
    from kalmannorm.lab.fitting import load  # noqa: PLC0415
    from kalmannorm.lab.seen import statistics_batches  # noqa: PLC0415

    network: Any = load(folder).network
    data = build(config, "data")
    data.setup()
    size = config["model"]["init_args"]["statistics_batch"]
    gaps = gaps_of(network, list(islice(statistics_batches(data.test_dataloader(), size), BATCHES)))
    return gaps, {name: network.get_submodule(name).running_var for name in gaps}


def relative_gap(gaps: Mapping[str, Tensor], running: Mapping[str, Tensor]) -> float:
    """The mean gap of a layer over its mean running variance, averaged over layers."""
    return statistics.fmean(float(gaps[name].mean() / running[name].mean()) for name in gaps)
