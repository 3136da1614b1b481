"""LayerNorm (Ba et al., 2016, arXiv:1607.06450) and InstanceNorm (Ulyanov et al., 2016, arXiv:1607.08022).

Both see each sample by itself: they are GroupNorm's two ends, one group of all channels and one group a channel.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.lab.baselines.replacing import replace_batchnorm


def to_layernorm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by LayerNorm over ``(C, H, W)``.

    It is GroupNorm with one group: weight and bias stay one a channel, where `nn.LayerNorm` has one an element.

    Returns:
        The same ``model``.

    Example:
        >>> to_layernorm(nn.Sequential(nn.BatchNorm2d(8)))[0].num_groups
        1
    """
    return replace_batchnorm(model, lambda norm: nn.GroupNorm(1, norm.num_features, norm.eps, norm.affine))


def to_instancenorm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by InstanceNorm over ``(H, W)``.

    It is written as GroupNorm with a group a channel, which takes inputs of every rank. In training,
    features of a single pixel have no variance, and torch raises an error.

    Returns:
        The same ``model``.

    Example:
        >>> to_instancenorm(nn.Sequential(nn.BatchNorm2d(8)))[0].num_groups
        8
    """

    def instance(norm: _BatchNorm) -> nn.Module:
        return nn.GroupNorm(norm.num_features, norm.num_features, norm.eps, norm.affine)

    return replace_batchnorm(model, instance)
