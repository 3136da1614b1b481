"""Statistics at inference other than the running ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from kalmannorm.modules import KalmanNorm

__all__ = ["online_statistics"]


@contextmanager
def online_statistics(model: nn.Module) -> Iterator[None]:
    """Normalize by the statistics of each batch in ``eval()`` (the paper's option B, Tables 4, 5, 7).

    Inside the ``with``, :class:`KalmanNorm` layers in ``eval()`` fuse each batch with its prior as in
    training, by groups of ``stats_batch_size`` if they have it; stock BatchNorm layers use the batch's
    statistics. No buffer changes. Layers in training are left alone.

    Args:
        model: the network.

    Raises:
        ValueError: where the model has no layer with running statistics.
    """
    kalman = [m for m in model.modules() if isinstance(m, KalmanNorm)]
    batch = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not kalman and not batch:
        raise ValueError(f"{type(model).__name__} has no KalmanNorm and no BatchNorm layer")
    was_online = [layer.online for layer in kalman]
    # A BatchNorm layer without running statistics uses the batch's.
    kept = [(layer, layer.running_mean, layer.running_var) for layer in batch if not layer.training]
    for layer in kalman:
        layer.online = True
    for stock, _, _ in kept:
        stock.running_mean = stock.running_var = None
    try:
        yield
    finally:
        for layer, online in zip(kalman, was_online, strict=True):
            layer.online = online
        for stock, mean, var in kept:
            stock.running_mean, stock.running_var = mean, var
