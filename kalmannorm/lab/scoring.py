"""Logits by online statistics: those of small batches (the paper's option B)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from kalmannorm import KalmanNorm, online_statistics
from kalmannorm.freezing import unfrozen_layers
from kalmannorm.inference import tracking_layers
from kalmannorm.traversal import attributes_kept


def online(network: nn.Module) -> AbstractContextManager[None]:
    """As `kalmannorm.online_statistics`; a null context if no layer has running statistics, or all are frozen."""
    return online_statistics(network) if tracking_layers(network) else nullcontext()


def online_logits(network: nn.Module, images: Tensor, statistics_batch: int) -> Tensor:
    """Logits ``(N, num_classes)``, each group of ``statistics_batch`` images normalized by its own statistics.

    If the images ``(N, C, H, W)`` do not fill the last group, it overlaps the one before. Networks
    without running statistics that are not frozen are called as usual.
    """
    layers = unfrozen_layers(network).values()
    if not layers:
        return network(images)  # type: ignore[no-any-return]
    kalman = [layer for layer in layers if isinstance(layer, KalmanNorm)]
    stock = len(kalman) < len(layers)
    size = min(statistics_batch, len(images))
    whole = len(images) - len(images) % size
    # The last group is filled with the images before it, whose logits are then dropped.
    groups = images if whole == len(images) else torch.cat([images[:whole], images[-size:]])
    with online_statistics(network), attributes_kept(kalman, "stats_batch_size"):
        for layer in kalman:
            # Layers with a process group do not support groups within a batch.
            if layer.process_group is None:
                layer.stats_batch_size = None if stock else size
        # Stock layers have no groups, so each group is a batch.
        logits = torch.cat([network(part) for part in groups.split(size)]) if stock else network(groups)
    return logits if whole == len(images) else torch.cat([logits[:whole], logits[whole - len(images) :]])
