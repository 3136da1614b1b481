"""EvoNorm-S0, normalization and activation in one (Liu et al., 2020, arXiv:2004.02967)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kalmannorm.lab.baselines.activated import replace_batchnorm_relu

__all__ = ["EvoNorm2d", "to_evonorm"]


class EvoNorm2d(nn.Module):
    """EvoNorm-S0: a gate of the input over the standard deviation of a channel group of each sample.

        y = weight * x * sigmoid(v * x) / sqrt(var over (C / groups, H, W) + eps) + bias

    The variance is the biased one; training and ``eval()`` do the same.

    Args:
        num_features: Channels ``C`` of an input ``(N, C, H, W)``.
        eps: Added to the variance.
        momentum: Not used; there are no moving averages. BatchNorm's place in the list of arguments.
        activation: Without it, the layer is its affine map alone, ``weight * x + bias``, for a place that no ReLU
            follows. The paper leaves this open; its authors' released code does it.
        groups: Channel groups. Where they do not divide ``C``, their greatest common divisor with it.
    """

    v: Tensor | None

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = None, activation: bool = True,
                 groups: int = 32) -> None:  # fmt: skip
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.groups = math.gcd(groups, num_features)
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_parameter("v", nn.Parameter(torch.ones(num_features)) if activation else None)

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        if input.ndim != 4 or input.shape[1] != self.num_features:
            raise ValueError(
                f"EvoNorm2d got an input of shape {tuple(input.shape)}, expected (N, {self.num_features}, H, W)"
            )
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        y = x
        if self.v is not None:
            y = x * torch.sigmoid(self.v.view(-1, 1, 1) * x) / self._standard_deviation(x)
        return (y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(input.dtype)

    def _standard_deviation(self, x: Tensor) -> Tensor:
        """Of each sample's groups, ``(N, C, 1, 1)``."""
        var = torch.var(x.unflatten(1, (self.groups, -1)), (2, 3, 4), correction=0)
        return (var + self.eps).sqrt().repeat_interleave(self.num_features // self.groups, 1)[..., None, None]

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.num_features}, eps={self.eps}, groups={self.groups}, activation={self.v is not None}"


def to_evonorm(model: nn.Module, groups: int = 32) -> nn.Module:
    """Put `EvoNorm2d` in the place of every BatchNorm, and of the ReLU directly behind it.

    How a ReLU is found, and what that asks of the network:
    `kalmannorm.lab.baselines.activated.replace_batchnorm_relu`.

    Returns:
        A traced network that shares everything else with ``model``.

    Example:
        >>> to_evonorm(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), groups=4)
        Sequential(
          (0): EvoNorm2d(8, eps=1e-05, groups=4, activation=True)
        )
    """
    return replace_batchnorm_relu(
        model,
        lambda norm, activation: EvoNorm2d(
            norm.num_features, norm.eps, activation=activation is not None, groups=groups
        ),
    )
