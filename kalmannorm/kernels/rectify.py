"""ReLU of a Gaussian, with a backward pass in closed form.

With ``a = m / s``, ``g = a Phi(a) + phi(a)`` and ``h = phi(a) - a Phi(-a)`` (the expected positive and
negative parts in units of ``s``), ``E = s g`` and ``var = v (Phi(a) - g h)``, without the cancellation of
``E[y^2] - E[y]^2``. A derivative by the variance is half a second derivative by the mean:

    d E = Phi dm + phi / (2 s) dv,    d var = 2 E Phi(-a) dm + (Phi(a) - g phi) dv.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kalmannorm.kernels.autograd import is_transformed


def _standardize(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``s``, ``a``, ``Phi(a)`` and ``phi(a)``."""
    std = var.clamp_min(torch.finfo(var.dtype).tiny ** 0.5).sqrt()
    a = (mean / std).clamp(-1e3, 1e3)
    return std, a, torch.special.ndtr(a), torch.exp(a.square() * -0.5) * (1 / math.sqrt(2 * math.pi))


def rectified(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``max(x, 0)``, in functions that autograd can differentiate."""
    std, a, above, density = _standardize(mean, var)
    positive = torch.addcmul(density, a, above)
    negative = torch.addcmul(density, a, torch.special.ndtr(-a), value=-1)
    # Where the input is surely positive, the mean itself carries no rounding of the quotient.
    after = torch.where(a > 30, mean, std * positive)
    return after, var * torch.addcmul(above, positive, negative, value=-1).clamp_min(0)


def rectified_gradients(mean: Tensor, var: Tensor, d_mean: Tensor, d_var: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``mean`` and ``var``, from those of the rectified moments."""
    std, a, above, density = _standardize(mean, var)
    positive = torch.addcmul(density, a, above)
    by_mean = d_mean * above + d_var * (2 * std * positive * torch.special.ndtr(-a))
    by_var = d_mean * (density / (2 * std)) + d_var * (above - positive * density)
    return by_mean, by_var


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(mean, var)
        return rectified(mean, var)

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mean, var = ctx.saved_tensors
        return rectified_gradients(mean, var, d_mean, d_var)


def rectify(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``max(x, 0)`` for a Gaussian ``x`` whose mean and variance have one shape."""
    if is_transformed() or not torch.is_grad_enabled():
        return rectified(mean, var)
    return _Rectify.apply(mean, var)  # type: ignore[no-untyped-call, no-any-return]
