"""Logits by other than running statistics: those of small batches (the paper's option B), or a blend."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm import KalmanNorm, online_statistics
from kalmannorm.freezing import unfrozen_layers
from kalmannorm.inference import tracking_layers
from kalmannorm.traversal import attributes_kept

__all__ = ["evalnorm", "has_running_statistics", "online", "online_logits"]


def online(network: nn.Module) -> AbstractContextManager[None]:
    """As `kalmannorm.online_statistics`; nothing where a network has no running statistics, or frozen ones alone."""
    return online_statistics(network) if has_running_statistics(network) else nullcontext()


def has_running_statistics(network: nn.Module) -> bool:
    """Whether a network has any that are not frozen."""
    return bool(tracking_layers(network))


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


@contextmanager
def evalnorm(network: nn.Module, alpha: float) -> Iterator[None]:
    """Normalize each image by a blend of its own and the running statistics: EvalNorm (Singh and Shrivastava, 2019).

    With an image's mean ``m`` and variance ``v`` in a channel, and the running ones ``M`` and ``V``, it takes those of
    a mixture of both:

        mean = alpha m + (1 - alpha) M        var = alpha v + (1 - alpha) V + alpha (1 - alpha) (m - M)^2

    The paper (arXiv:1904.06031) estimates a share of the mean and one of the variance for each layer. Here one share is
    that of both in all layers, to be chosen on validation images. 0 is plain ``eval()``.

    Args:
        network: In ``eval()``, with BatchNorm or Kalman layers that have running statistics.
        alpha: From 0 to 1.

    Raises:
        ValueError: Another ``alpha``; a network in training, or without running statistics.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm2d(3)).eval()
        >>> with evalnorm(network, 1.0):
        ...     bool(network(torch.randn(2, 3, 8, 8)).mean((2, 3)).abs().max() < 1e-4)
        True
    """
    layers = tracking_layers(network).values()
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1; got {alpha}")
    if not layers or any(layer.training for layer in layers):
        raise ValueError(f"evalnorm expects a network in eval() with running statistics; got {type(network).__name__}")
    hooks = [layer.register_forward_pre_hook(partial(_blended, alpha)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _blended(alpha: float, layer: Any, args: tuple[Tensor, ...]) -> Tensor:
    """An input that running statistics normalize as the blend would the layer's own: forward pre-hook."""
    x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
    shape = (-1, x.shape[1], *[1] * (x.ndim - 2))
    var, mean = torch.var_mean(x.reshape(*x.shape[:2], -1), 2, correction=0)
    shift = mean - layer.running_mean
    blend = alpha * var + (1 - alpha) * layer.running_var + alpha * (1 - alpha) * shift.square()
    scale = ((layer.running_var + layer.eps) / (blend + layer.eps)).sqrt().view(shape)
    centre = layer.running_mean.view(shape)
    moved: Tensor = (x - centre - alpha * shift.view(shape)) * scale + centre
    return moved.to(args[0].dtype)
