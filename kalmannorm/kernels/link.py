"""From one normalization layer to the next: a Gaussian, rectified or not, through a convolution or linear map.

    m' = sum_k W m + b        v' = sum_k W^2 v

over inputs and taps ``k``. Weights are by far the largest tensors that a belief meets. Forward, they are read once, for
both sums; backward, once more, when their own gradient is written. With incoming gradients ``dm`` and ``dv``,

    d m = dm W,    d v = dv W^2,    d W = dm^T m + 2 W * (dv^T v).

The ReLU before is that of `kalmannorm.kernels.rectify`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.kernels import operators
from kalmannorm.kernels.apply import differentiable_gradients, is_transformed
from kalmannorm.kernels.backends import backend_for
from kalmannorm.kernels.memory import as_dense
from kalmannorm.kernels.rectify import rectified

__all__ = ["Link", "link"]


class Link(NamedTuple):
    """What :func:`link` returns."""

    mean: Tensor
    """``(S, C_out, 1, ...)``, with the rank of the mean that was given."""
    var: Tensor
    """Likewise."""
    rectified_mean: Tensor | None
    """Shaped as the mean that was given; None where nothing was rectified."""
    rectified_var: Tensor | None
    """Likewise."""


def _plain(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor | None, ...]:
    """The same by functions that autograd knows."""
    after: tuple[Tensor | None, Tensor | None] = (None, None)
    if relu:
        mean, var = after = rectified(mean, var)
    shape = (mean.shape[0], weight.shape[0], *mean.shape[2:])
    mean, var = mean.flatten(1), var.flatten(1)
    taps = weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    out_mean, out_var = F.linear(mean, taps.sum(-1), bias), F.linear(var, taps.square().sum(-1))
    return out_mean.view(shape), out_var.view(shape), *after


def _compiled(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Link:
    out, after = operators.link(mean, var, weight, bias, relu)
    rectified_mean, rectified_var = after.view(2, *mean.shape).unbind(0) if relu else (None, None)
    out_mean, out_var = out.view(2, mean.shape[0], weight.shape[0], *mean.shape[2:]).unbind(0)
    return Link(out_mean, out_var, rectified_mean, rectified_var)


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, relu: bool,  # type: ignore[override]
                backend: ModuleType) -> Any:  # fmt: skip
        out, after = backend.link_forward(mean, var, weight, bias, relu)
        ctx.save_for_backward(mean, var, weight, bias, after)
        ctx.relu, ctx.backend = relu, backend
        ctx.set_materialize_grads(False)
        out = out.view(2, mean.shape[0], weight.shape[0], *mean.shape[2:])
        if after is None:
            return out[0], out[1], None, None
        after = after.view(2, *mean.shape)
        return out[0], out[1], after[0], after[1]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        mean, var, weight, bias, after = ctx.saved_tensors  # once: a checkpoint allows no more
        if torch.is_grad_enabled():
            return (*differentiable_gradients(_plain, (mean, var, weight, bias, ctx.relu), upstream), None)
        d_mean, d_var, *d_rectified = upstream
        shape = (mean.shape[0], weight.shape[0])
        d_mean = mean.new_zeros(shape) if d_mean is None else d_mean
        d_var = mean.new_zeros(shape) if d_var is None else d_var
        below, d_weight = ctx.backend.link_backward(mean, var, weight, after, d_mean, d_var, *d_rectified, ctx.relu)
        d_bias = None if bias is None else d_mean.reshape(shape).sum(0)
        below = below.view(2, *mean.shape)
        return below[0], below[1], d_weight, d_bias, None, None


def link(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Link:
    """Mean and variance of sums of independent terms, weighted by a matrix or a convolution's filter.

    Args:
        mean: ``(S, C_in, 1, ...)``, at least float32.
        var: likewise.
        weight: ``(C_out, C_in)``, or ``(C_out, C_in, *taps)``, whose taps all meet the same moments.
        bias: ``(C_out,)`` or None.
        relu: rectify the Gaussian before.

    Raises:
        ValueError: for moments of another number of channels than the weight's.
    """
    if mean.shape[1] != weight.shape[1] or var.shape != mean.shape:
        raise ValueError(
            f"got a mean and a variance of shapes {tuple(mean.shape)} and {tuple(var.shape)}, expected both of "
            f"{weight.shape[1]} channels, as the weight of shape {tuple(weight.shape)} has"
        )
    weight = weight.to(mean.dtype)
    bias = None if bias is None else bias.to(mean.dtype)
    if is_transformed() and not torch.compiler.is_compiling():
        return Link(*_plain(mean, var, weight, bias, relu))  # type: ignore[arg-type]
    mean, var, weight = mean.contiguous(), var.contiguous(), as_dense(weight)
    if torch.compiler.is_compiling():
        return _compiled(mean, var, weight, bias, relu)
    backend = backend_for(mean, var, weight, bias)
    return Link(*_Link.apply(mean, var, weight, bias, relu, backend))  # type: ignore[no-untyped-call]
