"""Logits by the statistics of small batches (the paper's option B), many of them in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm import KalmanNorm, online_statistics
from kalmannorm.freezing import is_frozen

__all__ = ["has_running_statistics", "online", "online_logits"]


def online(network: nn.Module) -> AbstractContextManager[None]:
    """As `kalmannorm.online_statistics`; nothing where a network has no running statistics, or frozen ones alone."""
    return online_statistics(network) if has_running_statistics(network) else nullcontext()


def has_running_statistics(network: nn.Module) -> bool:
    """Whether a network has any that are not frozen."""
    layers = [layer for layer in network.modules() if isinstance(layer, KalmanNorm | _BatchNorm)]
    return any(layer.running_mean is not None and not is_frozen(layer) for layer in layers)


def online_logits(network: nn.Module, images: Tensor, statistics_batch: int) -> Tensor:
    """What a network in ``eval()`` gives where each ``statistics_batch`` images normalize themselves.

    Networks without running statistics, or with frozen ones alone, give what they always give.

    Args:
        network: Images to logits.
        images: ``(N, C, H, W)``; where they don't make whole groups, the last group overlaps the one before.
        statistics_batch: Images a group.

    Returns:
        Logits ``(N, num_classes)``.
    """
    kalman = [layer for layer in network.modules() if isinstance(layer, KalmanNorm) and not is_frozen(layer)]
    stock = any(isinstance(layer, _BatchNorm) and not is_frozen(layer) for layer in network.modules())
    if not kalman and not stock:
        return network(images)  # type: ignore[no-any-return]
    size = min(statistics_batch, len(images))
    whole = len(images) - len(images) % size
    # A last group that is not full is filled with the images before it, whose logits are known already.
    groups = images if whole == len(images) else torch.cat([images[:whole], images[-size:]])
    with online_statistics(network):
        if stock:  # layers that know a whole batch only
            with _groups_of(kalman, None):
                logits = torch.cat([network(part) for part in groups.split(size)])
        else:
            with _groups_of(kalman, size):
                logits = network(groups)
    return logits if whole == len(images) else torch.cat([logits[:whole], logits[whole - len(images) :]])


@contextmanager
def _groups_of(layers: list[KalmanNorm], size: int | None) -> Iterator[None]:
    before = [layer.stats_batch_size for layer in layers]
    for layer in layers:
        # Layers that share statistics between processes have no groups within a batch.
        if layer.process_group is None:
            layer.stats_batch_size = size
    try:
        yield
    finally:
        for layer, samples in zip(layers, before, strict=True):
            layer.stats_batch_size = samples
