"""Normalization and activation in one: EvoNorm-S0 and Filter Response Normalization.

Liu et al., 2020, arXiv:2004.02967; Singh & Krishnan, 2020, arXiv:1911.09737. No other sample is seen, and training and
``eval()`` do the same.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from kalmannorm.lab.baselines.activated import replace_batchnorm_relu

__all__ = ["EvoNorm2d", "FilterResponseNorm2d", "to_evonorm", "to_frn"]


class _NormAct2d(nn.Module):
    """``weight * normalized x + bias``, with an activation's own parameter where there is one."""

    def __init__(self, num_features: int, eps: float, learned: str, initial: Tensor | None) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_parameter(learned, None if initial is None else nn.Parameter(initial))

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        if input.ndim != 4 or input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(input.shape)}, "
                f"expected (N, {self.num_features}, H, W)"
            )
        x = self.normalized(input.to(torch.promote_types(input.dtype, torch.float32)))
        return self.activated(x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(input.dtype)

    @abstractmethod
    def normalized(self, x: Tensor) -> Tensor:
        """Before the affine map."""

    def activated(self, y: Tensor) -> Tensor:
        """Behind it."""
        return y


class EvoNorm2d(_NormAct2d):
    """EvoNorm-S0: a gate of the input over the standard deviation of a channel group of each sample.

        y = weight * x * sigmoid(v * x) / sqrt(var over (C / groups, H, W) + eps) + bias

    The variance is the biased one.

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
        super().__init__(num_features, eps, "v", torch.ones(num_features) if activation else None)
        self.groups = math.gcd(groups, num_features)

    def normalized(self, x: Tensor) -> Tensor:
        if self.v is None:
            return x
        gated = x * torch.sigmoid(self.v.view(-1, 1, 1) * x)  # first: gradients are summed in the reverse order
        var = torch.var(x.unflatten(1, (self.groups, -1)), (2, 3, 4), correction=0)
        return gated / (var + self.eps).sqrt().repeat_interleave(self.num_features // self.groups, 1)[..., None, None]

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, groups={self.groups}, activation={self.v is not None}"


class FilterResponseNorm2d(_NormAct2d):
    """FRN and TLU: each channel of each sample over its root mean square, and a learned threshold instead of ReLU.

        nu2 = mean of x^2 over (H, W)
        y = max(weight * x / sqrt(nu2 + eps) + bias, threshold)

    No mean is subtracted.

    Args:
        num_features: Channels ``C`` of an input ``(N, C, H, W)``.
        eps: Added to the mean square.
        momentum: Not used; there are no moving averages. BatchNorm's place in the list of arguments.
        activation: Without it, the maximum is left out: for a place that no ReLU follows.
        learned_eps: Add the absolute value of a learned number, at first 1e-4, to `eps`: what the paper has
            for features of a single pixel, whose sign is otherwise all that is left of them.
    """

    threshold: Tensor | None
    more_eps: Tensor | None

    def __init__(self, num_features: int, eps: float = 1e-6, momentum: float | None = None, activation: bool = True,
                 learned_eps: bool = False) -> None:  # fmt: skip
        super().__init__(num_features, eps, "threshold", torch.zeros(num_features) if activation else None)
        self.register_parameter("more_eps", nn.Parameter(torch.tensor([1e-4])) if learned_eps else None)

    def normalized(self, x: Tensor) -> Tensor:
        eps = self.eps if self.more_eps is None else self.eps + self.more_eps.abs()
        return x * (x.square().mean((2, 3), keepdim=True) + eps).rsqrt()

    def activated(self, y: Tensor) -> Tensor:
        return y if self.threshold is None else torch.maximum(y, self.threshold.view(-1, 1, 1))

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, activation={self.threshold is not None}"


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


def to_frn(model: nn.Module, learned_eps: bool = False) -> nn.Module:
    """Put `FilterResponseNorm2d` in the place of every BatchNorm, and of the ReLU directly behind it; see `to_evonorm`.

    The paper asks for a learning rate that rises at the start, which `kalmannorm.lab.training.Classifier` gives it with
    every schedule.

    Example:
        >>> to_frn(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)))
        Sequential(
          (0): FilterResponseNorm2d(8, eps=1e-06, activation=True)
          (2): FilterResponseNorm2d(8, eps=1e-06, activation=False)
        )
    """
    return replace_batchnorm_relu(
        model,
        lambda norm, activation: FilterResponseNorm2d(
            norm.num_features, activation=activation is not None, learned_eps=learned_eps
        ),
    )
