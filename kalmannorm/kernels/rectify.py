"""ReLU of a Gaussian, leaky or not, with a backward pass in closed form.

With ``a = m / s``, ``g = a Phi(a) + phi(a)`` and ``h = phi(a) - a Phi(-a)`` (the expected positive and
negative parts in units of ``s``), ``E = s g`` and ``var = v (Phi(a) - g h)``, without the cancellation of
``E[y^2] - E[y]^2``. A derivative by the variance is half a second derivative by the mean:

    d E = Phi dm + phi / (2 s) dv,    d var = 2 E Phi(-a) dm + (Phi(a) - g phi) dv.

With a slope ``k`` below zero, ``y = k x + (1 - k) relu(x)``, and by Stein's lemma the covariance of ``x`` and
``relu(x)`` is ``v Phi(a)``.
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


def rectified(mean: Tensor, var: Tensor, *, slope: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``max(x, 0)``, or of ``slope x`` below zero, in functions that torch can differentiate."""
    std, a, above, density = _standardize(mean, var)
    positive = torch.addcmul(density, a, above)
    negative = torch.addcmul(density, a, torch.special.ndtr(-a), value=-1)
    # Where the input is surely positive, the mean itself carries no rounding of the quotient.
    after = torch.where(a > 30, mean, std * positive)
    share = torch.addcmul(above, positive, negative, value=-1).clamp_min(0)
    if slope:
        rest = 1 - slope
        return torch.lerp(after, mean, slope), var * (rest**2 * share + 2 * slope * rest * above + slope**2)
    return after, var * share


def rectified_gradients(mean: Tensor, var: Tensor, d_mean: Tensor, d_var: Tensor, *,
                        slope: float = 0.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of ``mean`` and ``var``, from those of the rectified moments."""
    std, a, above, density = _standardize(mean, var)
    positive = torch.addcmul(density, a, above)
    mean_by_mean, mean_by_var = above, density / (2 * std)
    var_by_mean, var_by_var = 2 * std * positive * torch.special.ndtr(-a), above - positive * density
    if slope:
        rest, both = 1 - slope, 2 * slope * (1 - slope)
        mean_by_mean, mean_by_var = rest * mean_by_mean + slope, rest * mean_by_var
        var_by_mean = rest**2 * var_by_mean + both * std * density
        var_by_var = rest**2 * var_by_var + both * (above - a * density / 2) + slope**2
    return d_mean * mean_by_mean + d_var * var_by_mean, d_mean * mean_by_var + d_var * var_by_var


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, slope: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(mean, var)
        ctx.slope = slope
        return rectified(mean, var, slope=slope)

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        mean, var = ctx.saved_tensors
        return *rectified_gradients(mean, var, d_mean, d_var, slope=ctx.slope), None


def rectify(mean: Tensor, var: Tensor, *, slope: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``max(x, 0)``, or of ``slope x`` below zero, for a Gaussian ``x`` whose mean and variance
    have one shape.
    """
    if is_transformed() or not torch.is_grad_enabled():
        return rectified(mean, var, slope=slope)
    return _Rectify.apply(mean, var, slope)  # type: ignore[no-untyped-call, no-any-return]
