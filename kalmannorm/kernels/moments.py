"""Mean and variance of a batch, with a backward pass that goes over it once.

    d x = (d mean + 2 d var (x - mean)) / n

torch's ``var_mean`` computes the same, on a CPU three times as slowly as BatchNorm's kernel, used here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kalmannorm.kernels.autograd import is_transformed


def _observe(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`moments` without the gradient; differentiable under a transform."""
    if x.device.type == "cpu" and not is_transformed():
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        var, mean = torch.var_mean(x, (0, *range(2, x.ndim)), correction=0)
    return mean, var


def slope_by_variance(by_var: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The factor of ``x`` in ``by_var (x - mean)``, zero where the difference is nothing but rounding.

    A constant channel's slope may be infinite, as a standard deviation's is at zero.
    """
    rounding = mean * (8 * torch.finfo(mean.dtype).eps)
    return torch.where(var > rounding.square(), by_var, 0.0)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mean, var = _observe(x)
        ctx.save_for_backward(x, mean, var)
        return mean, var

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor) -> Tensor:  # type: ignore[override]
        x, mean, var = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = slope_by_variance(d_var * (2 / count), mean, var)
        offset = d_mean / count - slope * mean
        shape = (1, -1, *[1] * (x.ndim - 2))
        return torch.addcmul(offset.view(shape), x, slope.view(shape))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, ``(C,)`` each, of ``(N, C, *)``, which is float32 or float64 and not empty."""
    if is_transformed() or not torch.is_grad_enabled():
        return _observe(x)
    return _Moments.apply(x)  # type: ignore[no-untyped-call, no-any-return]
