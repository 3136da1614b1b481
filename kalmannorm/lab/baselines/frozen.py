"""BN*: BatchNorm fixed at the statistics of a trained network (the KN paper's Table 6)."""

from __future__ import annotations

from torch import nn

from kalmannorm.freezing import freeze


def to_frozen(model: nn.Module) -> nn.Module:
    """Fix every BatchNorm inside ``model``, in place: running statistics normalize in training too.

    It means something for a network that was trained before. One that was not normalizes by its initial
    mean 0 and variance 1, which is no normalization at all.

    Returns:
        The same ``model``.

    Example:
        >>> to_frozen(nn.Sequential(nn.BatchNorm2d(8)))[0].weight.requires_grad
        False
    """
    return freeze(model)
