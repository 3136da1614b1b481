"""The cells of tables that are not a trained network's accuracy: counts, speeds, and what is measured afterwards."""

import statistics
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalmannorm.lab.costs import build, device, image_size, random_batch, timed_step
from kalmannorm.lab.experiments import merge

ROUNDS = 20
BATCHES = 1000


def parameters(config: Mapping[str, Any]) -> dict[str, float]:
    """How many parameters the network of a configuration has, in millions (Table 2)."""
    return {"parameters": sum(each.numel() for each in without_memory(config).network.parameters()) / 1e6}


def without_memory(config: Mapping[str, Any]) -> Any:
    """The module of a configuration, on torch's meta device; statistics of the input need numbers, and are left out."""
    given = config["model"]["init_args"]
    options = dict(given.get("normalization_options") or {})
    options.pop("input_stats", None)
    model = {**config["model"], "init_args": {**given, "normalization_options": options}}
    with torch.device("meta"):
        return build({**config, "model": model}, "model")


def speed(config: Mapping[str, Any], rounds: int = ROUNDS) -> dict[str, float]:
    """Images a second in training on random images, BN and a form of KN in turn (Table 3).

    A step is of one statistics batch, as one device of the paper's takes it. The median of
    ``rounds`` steps each, after two that warm up.
    """
    given = config["model"]["init_args"]
    count, size = given["statistics_batch"], image_size(config)
    assert size is not None
    batch = random_batch(count, size, given["num_classes"])
    stock = {"normalization": "bn", "normalization_options": None}
    configs = {"bn": merge(config, {"model": {"init_args": stock}}), "kn": config}
    modules = {name: build(each, "model").to(device()).train() for name, each in configs.items()}
    optimizers = {name: module.configure_optimizers()["optimizer"] for name, module in modules.items()}
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(2 + rounds):
        for name, module in modules.items():
            seconds[name].append(timed_step(module, optimizers[name], batch))
    bn, kn = (statistics.median(seconds[name][2:]) for name in ("bn", "kn"))
    return {"images_per_second_bn": count / bn, "images_per_second_kn": count / kn, "ratio": kn / bn}


# What is computed in place of a training, from a configuration.
COMPUTED: dict[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {"parameters": parameters, "speed": speed}


def measured_gaps(folder: Path, config: Mapping[str, Any], drawing: Path | None = None) -> float:
    """Fig. 5 of a run's network on test images, see `relative_gap`; drawn as PNG if asked for."""
    from kalmannorm.lab.analysis import variance_gaps  # noqa: PLC0415
    from kalmannorm.lab.figures import variance_gaps as drawn  # noqa: PLC0415
    from kalmannorm.lab.fitting import load  # noqa: PLC0415
    from kalmannorm.lab.seen import statistics_batches  # noqa: PLC0415

    network: Any = load(folder).network
    data = build(config, "data")
    data.setup()
    size = config["model"]["init_args"]["statistics_batch"]
    gaps = variance_gaps(network, list(islice(statistics_batches(data.test_dataloader(), size), BATCHES)))
    if drawing is not None:
        drawn(f"{size} images", gaps).savefig(drawing, dpi=150)
    return relative_gap(gaps, {name: network.get_submodule(name).running_var for name in gaps})


def relative_gap(gaps: Mapping[str, Tensor], running: Mapping[str, Tensor]) -> float:
    """The mean gap of a layer over its mean running variance, averaged over layers."""
    return statistics.fmean(float(gaps[name].mean() / running[name].mean()) for name in gaps)
