"""Mean and variance of a batch, with a backward pass that goes over it once.

    d x = (d mean + 2 d var (x - mean)) / n

torch's ``var_mean`` computes the same; its forward pass on a CPU takes three times as long as the
statistics kernel of BatchNorm, which is used here, and its backward pass computes the mean anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kalmannorm.kernels.apply import direct, is_transformed

__all__ = ["moments"]


def observe_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``(N, C, *)``, at least float32, without a gradient."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.device.type == "cpu" and not is_transformed():
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        var, mean = torch.var_mean(x, (0, *range(2, x.ndim)), correction=0)
    return mean, var


def slope_by_variance(by_var: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The factor of ``x`` in ``by_var (x - mean)``, zero where the difference is nothing but rounding.

    Such a channel is constant. What is believed of it may have an infinite slope there (that of a
    standard deviation at zero), which would make garbage of the rounding.
    """
    rounding = mean * (8 * torch.finfo(mean.dtype).eps)
    return torch.where(var > rounding.square(), by_var, 0.0)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return observe_channels(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor) -> Tensor:  # type: ignore[override]
        x, mean, var = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = slope_by_variance(d_var * (2 / count), mean, var)
        offset = d_mean / count - slope * mean
        shape = (1, -1, *[1] * (x.ndim - 2))
        return torch.addcmul(offset.view(shape), x, slope.view(shape))


_apply = direct(_Moments)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel.

    Args:
        x: ``(N, C, *)``, float32 or float64, not empty.

    Returns:
        Each ``(C,)``.
    """
    result: tuple[Tensor, Tensor] = _apply(x)
    return result
