"""Filter Response Normalization and the thresholded linear unit (Singh & Krishnan, 2020, arXiv:1911.09737)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kalmannorm.lab.baselines.activated import replace_batchnorm_relu

__all__ = ["FilterResponseNorm2d", "to_frn"]


class FilterResponseNorm2d(nn.Module):
    """Each channel of each sample over its root mean square, and a learned threshold instead of ReLU.

        nu2 = mean of x^2 over (H, W)
        y = max(weight * x / sqrt(nu2 + eps) + bias, threshold)

    No mean is subtracted, no other sample is seen, and training and ``eval()`` do the same.

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
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_parameter("threshold", nn.Parameter(torch.zeros(num_features)) if activation else None)
        self.register_parameter("more_eps", nn.Parameter(torch.tensor([1e-4])) if learned_eps else None)

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        if input.ndim != 4 or input.shape[1] != self.num_features:
            raise ValueError(
                f"FilterResponseNorm2d got an input of shape {tuple(input.shape)}, "
                f"expected (N, {self.num_features}, H, W)"
            )
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        eps = self.eps if self.more_eps is None else self.eps + self.more_eps.abs()
        scale = (x.square().mean((2, 3), keepdim=True) + eps).rsqrt()
        y = x * scale * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        if self.threshold is not None:
            y = torch.maximum(y, self.threshold.view(-1, 1, 1))
        return y.to(input.dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.num_features}, eps={self.eps}, activation={self.threshold is not None}"


def to_frn(model: nn.Module, learned_eps: bool = False) -> nn.Module:
    """Put `FilterResponseNorm2d` in the place of every BatchNorm, and of the ReLU directly behind it.

    Where no ReLU follows, the layer has no threshold. How a ReLU is found, and what that asks of the network:
    `kalmannorm.lab.baselines.activated.replace_batchnorm_relu`. The paper asks for a learning rate that rises at the
    start, which `kalmannorm.lab.training.Classifier` gives it with every schedule.

    Returns:
        A traced network that shares everything else with ``model``.

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
