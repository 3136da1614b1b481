"""Normalization and activation in one, by timm: EvoNorm-S0 and Filter Response Normalization.

Liu et al., 2020, arXiv:2004.02967; Singh & Krishnan, 2020, arXiv:1911.09737. No other sample is seen, and training and
``eval()`` do the same. Where no ReLU follows a BatchNorm, what takes its place has no activation of its own: EvoNorm is
then its affine map alone, which the paper leaves open and its authors' released code does.
"""

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.lab.baselines.activated import replace_batchnorm_relu


def _channels(norm: _BatchNorm) -> int:
    """Of a BatchNorm of images: timm's layers take nothing else."""
    if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm3d)):
        raise ValueError(f"EvoNorm and FRN got a {type(norm).__name__} to replace, expected BatchNorm of images")
    return norm.num_features


def to_evonorm(model: nn.Module, groups: int = 32) -> nn.Module:
    """Put EvoNorm-S0 in the place of every BatchNorm and the ReLU behind it, in a traced network.

    How a ReLU is found, and what that asks of the network:
    `kalmannorm.lab.baselines.activated.replace_batchnorm_relu`. Where the channel groups do not
    divide a layer's channels, it has their greatest common divisor with them.
    """
    from timm.layers.evo_norm import EvoNorm2dS0  # noqa: PLC0415 - slow

    return replace_batchnorm_relu(
        model,
        lambda norm, activation: EvoNorm2dS0(
            _channels(norm), math.gcd(groups, norm.num_features), apply_act=activation is not None, eps=norm.eps
        ),
    )


def to_frn(model: nn.Module) -> nn.Module:
    """Put FRN and TLU in the place of every BatchNorm and the ReLU behind it; see `to_evonorm`.

    The paper asks for a learning rate that rises at the start, which
    `kalmannorm.lab.training.Classifier` gives it with every schedule.
    """
    from timm.layers.filter_response_norm import FilterResponseNormTlu2d  # noqa: PLC0415 - slow

    return replace_batchnorm_relu(
        model,
        lambda norm, activation: FilterResponseNormTlu2d(_channels(norm), apply_act=activation is not None, eps=1e-6),
    )
