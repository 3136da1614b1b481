"""Layers of torch and of this library in BatchNorm's place.

GroupNorm (Wu & He, 2018, arXiv:1803.08494) and its two ends, one group of all channels and one group a channel:
LayerNorm (Ba et al., 2016, arXiv:1607.06450) and InstanceNorm (Ulyanov et al., 2016, arXiv:1607.08022), which see each
sample by itself. BatchNorm by parts of a batch, over all devices, and frozen.
"""

import math
from collections.abc import Callable

from torch import nn

import kalmannorm
from kalmannorm.lab.baselines.replacing import replace_batchnorm


def _to_groups(model: nn.Module, groups_of: Callable[[int], int]) -> nn.Module:
    return replace_batchnorm(
        model, lambda norm: nn.GroupNorm(groups_of(norm.num_features), norm.num_features, norm.eps, norm.affine)
    )


def to_groupnorm(model: nn.Module, groups: int = 32) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by ``nn.GroupNorm``, and return it.

    The paper has 32 groups. Where they do not divide a layer's channels, it has their greatest
    common divisor with them.

    Example:
        >>> [norm.num_groups for norm in to_groupnorm(nn.Sequential(nn.BatchNorm2d(64), nn.BatchNorm2d(24)))]
        [32, 8]
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1; got {groups}")
    return _to_groups(model, lambda channels: math.gcd(groups, channels))


def to_layernorm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by LayerNorm over ``(C, H, W)``.

    It is GroupNorm with one group: weight and bias stay one a channel, where `nn.LayerNorm` has one
    an element.
    """
    return _to_groups(model, lambda channels: 1)


def to_instancenorm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by InstanceNorm over ``(H, W)``.

    It is GroupNorm with a group a channel, which takes inputs of every rank. In training, features
    of a single pixel have no variance, and torch raises an error.
    """
    return _to_groups(model, lambda channels: channels)


def to_ghost(model: nn.Module, samples: int = 2) -> nn.Module:
    """Ghost BatchNorm (Hoffer et al., 2017, arXiv:1705.08741): by parts of a batch, in place.

    The layers are `kalmannorm.KalmanNorm2d` and the like with ``gain=1.0``, which is BatchNorm, by
    groups of so many samples, which must divide every batch: 128 in the paper; 2 is the KN paper's
    smallest. The running statistics move once a step towards the mean over groups; Hoffer et al.
    move them once a group.

    Example:
        >>> to_ghost(nn.Sequential(nn.BatchNorm2d(8)), 4)[0].stats_batch_size
        4
    """
    return kalmannorm.convert(model, gain=1.0, process_noise=False, stats_batch_size=samples)


def to_sync(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by ``nn.SyncBatchNorm``.

    Without a process group this is BatchNorm; with one, torch takes inputs on accelerators only.
    """
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def to_frozen(model: nn.Module, last_layer: bool = False) -> nn.Module:
    """BN*, of the KN paper's Table 6: running statistics normalize in training too; in place.

    An untrained network then normalizes by its initial mean 0 and variance 1: not at all. With ``last_layer`` the last
    linear layer alone is trained.

    Example:
        >>> to_frozen(nn.Sequential(nn.BatchNorm2d(8)))[0].weight.requires_grad
        False
        >>> network = to_frozen(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 2)), last_layer=True)
        >>> [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        ['2.weight', '2.bias']
    """
    if last_layer:
        linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise ValueError(f"{type(model).__name__} has no linear layer, expected one to train alone (last_layer)")
        model.requires_grad_(False)
        linear[-1].requires_grad_(True)
    return kalmannorm.freeze(model)
