"""A network's costs: its parameters, its speed, and its time for a training step on this machine."""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser

from kalmannorm.lab.configuration import BASES, reason
from kalmannorm.lab.experiments import merge

# On a CPU a step is timed on at most this many pixels, and extrapolated in proportion.
PIXELS = 8 * 32 * 32
Batch = tuple[torch.Tensor, torch.Tensor]


def build(config: Mapping[str, Any], part: Literal["model", "data"]) -> Any:
    """The module, or the data module, of a configuration."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BASES[part], part)
    given = dict(config[part])
    if part == "model":
        given = merge(given, {"init_args": {"steps": config["trainer"]["max_steps"]}})
    try:
        parsed = parser.parse_object({part: given})
    except ArgumentError as error:
        raise ValueError(f"{part}: {reason(error)}") from error
    return parser.instantiate(parsed)[part]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def image_size(config: Mapping[str, Any]) -> int | None:
    """Side of the square images that a configuration trains on; None if the images differ in size."""
    kind = config["data"]["class_path"].rpartition(".")[2]
    default = {"ClassificationData": 32, "FolderData": 224}.get(kind)
    return default and (config["data"]["init_args"].get("size") or default)


def random_batch(count: int, size: int, classes: int) -> Batch:
    """Images of noise ``(count, 3, size, size)``, and labels, on `device`."""
    images = torch.randn(count, 3, size, size, device=device())
    return images, torch.randint(0, classes, (count,), device=device())


def timed_step(module: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Seconds of one training step, the device's work included."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*self.trainer. reference is not registered.*")
        module.training_step(batch, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _medians(configs: Sequence[Mapping[str, Any]], batch: Batch, warm_up: int, steps: int) -> list[float]:
    """Median seconds of a training step of each configuration, timed in turn after ``warm_up`` steps."""
    modules = [build(config, "model").to(device()).train() for config in configs]
    pairs = [(module, module.configure_optimizers()["optimizer"]) for module in modules]
    seconds = [[timed_step(*pair, batch) for pair in pairs] for _ in range(warm_up + steps)]
    return [statistics.median(each) for each in zip(*seconds[warm_up:], strict=True)]


def seconds_per_step(config: Mapping[str, Any], steps: int = 3) -> float | None:
    """Seconds of a training step on one thread, without data loading and validation.

    It is the median of ``steps`` steps, after one to warm up. None if the images differ in size.
    """
    size = image_size(config)
    if size is None:
        return None
    whole = int(config["data"]["init_args"]["gradient_batch"])
    count = whole if device().type == "cuda" else min(whole, max(2, PIXELS // size**2))
    given = config["model"]["init_args"]
    group = min(given.get("statistics_batch") or count, count)
    count -= count % group
    smaller = merge(config, {"model": {"init_args": {"statistics_batch": group}}})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a training
    try:
        batch = random_batch(count, size, given.get("num_classes", 10))
        return _medians([smaller], batch, 1, steps)[0] * whole / count
    finally:
        torch.set_num_threads(threads)


def where() -> str:
    """The device of `seconds_per_step`, in words."""
    return torch.cuda.get_device_name() if device().type == "cuda" else "one CPU thread"


def parameters(config: Mapping[str, Any]) -> dict[str, float]:
    """The number of parameters of a configuration's network, in millions (Table 2)."""
    return {"parameters": sum(each.numel() for each in without_memory(config).network.parameters()) / 1e6}


def without_memory(config: Mapping[str, Any]) -> Any:
    """The module of a configuration on the meta device."""
    with torch.device("meta"):
        return build(config, "model")


def speed(config: Mapping[str, Any], rounds: int = 20) -> dict[str, float]:
    """Images a second in training on random images, BN and a form of KN in turn (Table 3).

    A step takes one statistics batch, as on one device in the paper. The median of ``rounds`` steps
    each, after two to warm up.
    """
    given = config["model"]["init_args"]
    count, size = given["statistics_batch"], image_size(config)
    assert size is not None
    batch = random_batch(count, size, given["num_classes"])
    stock = {"normalization": "bn", "normalization_options": None}
    bn, kn = _medians([merge(config, {"model": {"init_args": stock}}), config], batch, 2, rounds)
    return {"images_per_second_bn": count / bn, "images_per_second_kn": count / kn, "ratio": kn / bn}


# Analyses that are computed from a configuration, without training.
COMPUTED: dict[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {"parameters": parameters, "speed": speed}
