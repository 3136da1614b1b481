"""Logits by other than running statistics: those of small batches (the paper's option B)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from kalmannorm import KalmanNorm, online_statistics
from kalmannorm.freezing import unfrozen_layers
from kalmannorm.inference import tracking_layers
from kalmannorm.traversal import attributes_kept


def online(network: nn.Module) -> AbstractContextManager[None]:
    """As `kalmannorm.online_statistics`; nothing where a network has no running statistics, or frozen ones alone."""
    return online_statistics(network) if tracking_layers(network) else nullcontext()


def online_logits(network: nn.Module, images: Tensor, statistics_batch: int) -> Tensor:
    """Logits ``(N, num_classes)`` where each ``statistics_batch`` images normalize themselves.

    Where the images ``(N, C, H, W)`` don't make whole groups, the last group overlaps the one
    before. Networks without running statistics, or with frozen ones alone, compute as always.
    """
    layers = unfrozen_layers(network).values()
    if not layers:
        return network(images)  # type: ignore[no-any-return]
    kalman = [layer for layer in layers if isinstance(layer, KalmanNorm)]
    stock = len(kalman) < len(layers)
    size = min(statistics_batch, len(images))
    whole = len(images) - len(images) % size
    # A last group that is not full is filled with the images before it, whose logits are known already.
    groups = images if whole == len(images) else torch.cat([images[:whole], images[-size:]])
    with online_statistics(network), attributes_kept(kalman, "stats_batch_size"):
        for layer in kalman:
            # Layers that share statistics between processes have no groups within a batch.
            if layer.process_group is None:
                layer.stats_batch_size = None if stock else size
        # Stock layers know a whole batch only.
        logits = torch.cat([network(part) for part in groups.split(size)]) if stock else network(groups)
    return logits if whole == len(images) else torch.cat([logits[:whole], logits[whole - len(images) :]])
