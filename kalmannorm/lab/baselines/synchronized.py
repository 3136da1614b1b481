"""BatchNorm with statistics over all devices, torch's own."""

from __future__ import annotations

from torch import nn


def to_sync(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by ``nn.SyncBatchNorm``.

    Without a process group this is BatchNorm; with one, torch takes inputs on accelerators only.

    Returns:
        The same ``model``, or the new layer where it was itself a BatchNorm.

    Example:
        >>> type(to_sync(nn.Sequential(nn.BatchNorm2d(8)))[0]).__name__
        'SyncBatchNorm'
    """
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted
