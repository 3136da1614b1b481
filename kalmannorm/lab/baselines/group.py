"""GroupNorm (Wu & He, 2018, arXiv:1803.08494) in BatchNorm's place."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.lab.baselines.replacing import replace_batchnorm


def to_groupnorm(model: nn.Module, groups: int = 32) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by ``nn.GroupNorm``.

    Args:
        model: Any network with BatchNorm layers.
        groups: Groups of channels a layer, 32 in the paper. Where they do not divide a layer's channels, their greatest
            common divisor with them.

    Returns:
        The same ``model``.

    Example:
        >>> [norm.num_groups for norm in to_groupnorm(nn.Sequential(nn.BatchNorm2d(64), nn.BatchNorm2d(24)))]
        [32, 8]
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1; got {groups}")

    def group_norm(norm: _BatchNorm) -> nn.GroupNorm:
        return nn.GroupNorm(math.gcd(groups, norm.num_features), norm.num_features, norm.eps, norm.affine)

    return replace_batchnorm(model, group_norm)
