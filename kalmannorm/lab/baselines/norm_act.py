"""Normalization and activation in one, by timm: EvoNorm-S0 and Filter Response Normalization.

Liu et al., 2020, arXiv:2004.02967; Singh & Krishnan, 2020, arXiv:1911.09737. Samples are independent, and training and
``eval()`` do the same. If no ReLU follows a BatchNorm, its replacement has no activation. EvoNorm is then only an
affine map, as in its authors' released code; the paper leaves this open.
"""

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.lab.baselines.activated import replace_batchnorm_relu


def _channels(norm: _BatchNorm) -> int:
    """A BatchNorm's channels; a ValueError if it is not for images, as timm's layers are."""
    if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm3d)):
        raise ValueError(f"EvoNorm and FRN got a {type(norm).__name__} to replace, expected BatchNorm of images")
    return norm.num_features


def to_evonorm(model: nn.Module, groups: int = 32) -> nn.Module:
    """Replace every BatchNorm and the ReLU after it by EvoNorm-S0, in a traced network.

    For how a ReLU is found see `kalmannorm.lab.baselines.activated.replace_batchnorm_relu`. If
    ``groups`` does not divide a layer's channels, their greatest common divisor is used.
    """
    from timm.layers.evo_norm import EvoNorm2dS0  # noqa: PLC0415 - slow

    return replace_batchnorm_relu(
        model,
        lambda norm, activation: EvoNorm2dS0(
            _channels(norm), math.gcd(groups, norm.num_features), apply_act=activation is not None, eps=norm.eps
        ),
    )


def to_frn(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm and the ReLU after it by FRN and TLU; see `to_evonorm`.

    The paper asks for a learning rate that rises at the start;
    `kalmannorm.lab.training.Classifier` adds that to every schedule.
    """
    from timm.layers.filter_response_norm import FilterResponseNormTlu2d  # noqa: PLC0415 - slow

    return replace_batchnorm_relu(
        model,
        lambda norm, activation: FilterResponseNormTlu2d(_channels(norm), apply_act=activation is not None, eps=1e-6),
    )
