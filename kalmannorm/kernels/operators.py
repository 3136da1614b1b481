"""The layer and the link as operators of torch's, which ``torch.compile`` keeps whole.

Left to itself, the compiler makes some hundred small operations of each, and its compilation takes several times as
long. In eager mode an autograd function costs less than an operator does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kalmannorm.kernels.backends import backend_for
from kalmannorm.kernels.options import Filter

__all__ = ["layer", "link"]


@torch.library.custom_op("kalmannorm::link", mutates_args=())
def link(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    """``(2, S, C_out)``, and the rectified moments ``(2, S, C_in)``, empty where nothing was rectified."""
    out, rectified = backend_for(mean, var, weight, bias).link_forward(mean, var, weight, bias, relu)
    return out, mean.new_empty(0) if rectified is None else rectified


@link.register_fake
def _(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    groups, channels = mean.shape[:2]
    return mean.new_empty(2, groups, weight.shape[0]), mean.new_empty((2, groups, channels) if relu else 0)


@torch.library.custom_op("kalmannorm::link_backward", mutates_args=())
def _link_backward(mean: Tensor, var: Tensor, weight: Tensor, rectified: Tensor, d_out: Tensor, d_rectified: Tensor,
                   relu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of both moments, ``(2, S, C_in)``, and of the weight."""
    after, sent = (rectified, d_rectified.contiguous().unbind(0)) if relu else (None, (None, None))
    above = d_out.contiguous().unbind(0)
    below, d_weight = backend_for(mean, var, weight).link_backward(mean, var, weight, after, *above, *sent, relu)
    return below, d_weight


@_link_backward.register_fake
def _(mean: Tensor, var: Tensor, weight: Tensor, rectified: Tensor, d_out: Tensor, d_rectified: Tensor,
      relu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    return mean.new_empty(2, *mean.shape[:2]), torch.empty_like(weight)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mean, var, weight, bias, ctx.relu = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(mean, var, weight, output[1])


def _backward(ctx: Any, d_out: Tensor, d_rectified: Tensor) -> tuple[Tensor | None, ...]:
    mean, var, weight, rectified = ctx.saved_tensors
    below, d_weight = _link_backward(mean, var, weight, rectified, d_out, d_rectified, ctx.relu)
    d_mean, d_var = below.view(2, *mean.shape).unbind(0)
    return d_mean, d_var, d_weight, d_out[0].sum(0) if ctx.has_bias else None, None


link.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("kalmannorm::layer", mutates_args=())
def layer(x: Tensor, other: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None, gain: Tensor | None,
          noise: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int, gain_slope: float,
          gain_offset: float, noise_scale: float, spread: bool, eps: float,
          relu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, and ``(6, S, C)`` statistics: see :func:`kalmannorm.kernels.on_torch.layer_forward`."""
    options = Filter(groups, gain_slope, gain_offset, noise_scale, spread, eps, relu)
    backend = backend_for(x, prior_mean, prior_var, gain, noise, weight, bias)
    y, statistics = backend.layer_forward(
        x, other, prior_mean, prior_var, gain, noise, weight, bias, None, options
    )
    return y, statistics


@layer.register_fake
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty((6, others[7], x.shape[1]), dtype=dtype)


@torch.library.custom_op("kalmannorm::layer_backward", mutates_args=())
def _layer_backward(dy: Tensor, x: Tensor, y: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None,
                    gain: Tensor | None, noise: Tensor | None, weight: Tensor | None, bias: Tensor | None,
                    statistics: Tensor, d_statistics: Tensor, groups: int, gain_slope: float, gain_offset: float,
                    noise_scale: float, spread: bool, eps: float, relu: bool) -> list[Tensor]:  # fmt: skip
    options = Filter(groups, gain_slope, gain_offset, noise_scale, spread, eps, relu)
    backend = backend_for(x, prior_mean, prior_var, gain, noise, weight, bias)
    sent = d_statistics.contiguous()[:4].unbind(0)
    gradients = backend.layer_backward(
        dy, x, y, prior_mean, prior_var, gain, noise, weight, bias, statistics, *sent, options
    )
    return [g for g in gradients if g is not None]


@_layer_backward.register_fake
def _(dy: Tensor, x: Tensor, y: Tensor | None, *others: Any) -> list[Tensor]:
    like = [x, *([] if y is None else [x]), *(t for t in others[:6] if t is not None)]
    return [torch.empty_like(t) for t in like]


def _remember_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, other, *parameters = inputs[:8]
    ctx.options = inputs[8:]
    ctx.has_other = other is not None
    y = output[0] if ctx.has_other and ctx.options[-1] else None
    ctx.save_for_backward(x, *parameters, y, output[1])


def _layer_gradients(ctx: Any, dy: Tensor, d_statistics: Tensor) -> tuple[Tensor | None, ...]:
    x, *parameters, y, statistics = ctx.saved_tensors
    found = iter(_layer_backward(dy, x, y, *parameters, statistics, d_statistics, *ctx.options))
    dx = next(found)
    d_other = next(found) if y is not None else dy if ctx.has_other else None
    return (dx, d_other, *(None if t is None else next(found) for t in parameters), *[None] * 7)


layer.register_autograd(_layer_gradients, setup_context=_remember_layer)
