"""GroupNorm (Wu & He, 2018, arXiv:1803.08494) in BatchNorm's place."""

from __future__ import annotations

from torch import nn

from kalmannorm.lab.baselines.replacing import replace_batchnorm


def to_groupnorm(model: nn.Module, groups: int = 4) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by ``nn.GroupNorm``.

    Args:
        model: Any network with BatchNorm layers.
        groups: Groups of channels a layer; must divide each layer's channels.

    Returns:
        The same ``model``.

    Example:
        >>> to_groupnorm(nn.Sequential(nn.BatchNorm2d(8)))[0].num_groups
        4
    """
    return replace_batchnorm(model, lambda norm: nn.GroupNorm(groups, norm.num_features, norm.eps, norm.affine))
