"""Mean and variance behind an activation, element by element, with a backward pass that multiplies by stored slopes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kalmannorm.kernels import on_cpu
from kalmannorm.kernels.autograd import differentiable_gradients, is_transformed, needs_torchs_functions
from kalmannorm.kernels.backends import backend_for
from kalmannorm.kernels.rectify import Moments, Slopes, rectified, rectified_with_slopes, through


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, plain: Callable[[Tensor, Tensor], Moments],  # type: ignore[override]
                sloped: Callable[[Tensor, Tensor], tuple[Moments, Slopes]]) -> Moments:  # fmt: skip
        after, slopes = sloped(mean, var)
        ctx.save_for_backward(mean, var, *slopes)
        ctx.plain = plain
        return after

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        mean, var, *slopes = ctx.saved_tensors
        if needs_torchs_functions(d_mean, d_var):
            return *differentiable_gradients(ctx.plain, (mean, var), (d_mean, d_var)), None, None
        return *through(slopes, d_mean, d_var), None, None


def activation(mean: Tensor, var: Tensor, plain: Callable[[Tensor, Tensor], Moments],
               sloped: Callable[[Tensor, Tensor], tuple[Moments, Slopes]] | None = None,
               compiled: Sequence[Any] = ()) -> Moments:  # fmt: skip
    """The moments behind an activation of a Gaussian.

    Args:
        mean: of any shape.
        var: of the same shape.
        plain: computes them in functions that torch can differentiate.
        sloped: computes them and the slopes; None if torch is to differentiate ``plain``.
        compiled: what :func:`kalmannorm.kernels.on_cpu.activation` takes, which then computes them where it can.
    """
    if is_transformed() or not torch.is_grad_enabled():
        return plain(mean, var)
    if compiled:
        mean, var = mean.contiguous(), var.contiguous()
        if backend_for(mean, mean, var) is on_cpu:
            sloped = partial(on_cpu.activation, compiled=compiled)
    if sloped is None:
        return plain(mean, var)
    return _Activation.apply(mean, var, plain, sloped)  # type: ignore[no-untyped-call, no-any-return]


def rectify(mean: Tensor, var: Tensor, *, slope: float = 0.0) -> Moments:
    """Mean and variance of ``max(x, 0)``, or of ``slope x`` below zero, for a Gaussian ``x`` whose mean and variance
    have one shape.
    """
    plain, sloped = partial(rectified, slope=slope), partial(rectified_with_slopes, slope=slope)
    return activation(mean, var, plain, sloped, ("pieces", [0.0], [(0.0, slope, 0.0), (0.0, 1.0, 0.0)]))
