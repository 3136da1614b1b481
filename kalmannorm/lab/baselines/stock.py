"""Layers of torch and of this library as replacements of BatchNorm.

GroupNorm (Wu & He, 2018, arXiv:1803.08494) and its extremes, one group of all channels and one group for each channel:
LayerNorm (Ba et al., 2016, arXiv:1607.06450) and InstanceNorm (Ulyanov et al., 2016, arXiv:1607.08022), which normalize
each sample by itself. BatchNorm by parts of a batch, over all devices, and frozen.
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

    The paper has 32 groups. If they do not divide a layer's channels, their greatest common divisor
    is used.

    Example:
        >>> [norm.num_groups for norm in to_groupnorm(nn.Sequential(nn.BatchNorm2d(64), nn.BatchNorm2d(24)))]
        [32, 8]
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1; got {groups}")
    return _to_groups(model, lambda channels: math.gcd(groups, channels))


def to_layernorm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by LayerNorm over ``(C, H, W)``.

    It is GroupNorm with one group: it has a weight and a bias for each channel, `nn.LayerNorm` for
    each element.
    """
    return _to_groups(model, lambda channels: 1)


def to_instancenorm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by InstanceNorm over ``(H, W)``.

    It is GroupNorm with one group for each channel, for inputs of any rank. In training, torch
    raises an error for features of a single pixel.
    """
    return _to_groups(model, lambda channels: channels)


def to_ghost(model: nn.Module, samples: int = 2) -> nn.Module:
    """Ghost BatchNorm (Hoffer et al., 2017, arXiv:1705.08741): by parts of a batch, in place.

    The layers are `kalmannorm.KalmanNorm2d` and the like with ``gain=1.0``, which is BatchNorm, in
    groups of ``samples``, which must divide every batch. The paper has 128; 2 is the KN paper's
    smallest. The running statistics are updated once for each batch, by the mean over groups; Hoffer
    et al. update them once for each group.

    Example:
        >>> to_ghost(nn.Sequential(nn.BatchNorm2d(8)), 4)[0].stats_batch_size
        4
    """
    return kalmannorm.convert(model, gain=1.0, process_noise=False, stats_batch_size=samples)


def to_sync(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by ``nn.SyncBatchNorm``.

    Without a process group it is BatchNorm; with one, torch supports inputs on accelerators only.
    """
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def to_frozen(model: nn.Module, last_layer: bool = False) -> nn.Module:
    """BN* of the KN paper's Table 6: normalize by running statistics in training too; in place.

    In an untrained network, with mean 0 and variance 1, this does not normalize. With ``last_layer`` only the last
    linear layer is trained.

    Example:
        >>> to_frozen(nn.Sequential(nn.BatchNorm2d(8)))[0].weight.requires_grad
        False
        >>> network = to_frozen(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), last_layer=True)
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
