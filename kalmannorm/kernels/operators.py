"""The layer and the link as operators of torch's, which ``torch.compile`` keeps whole.

Left to itself, the compiler makes some hundred small operations of each, and its compilation takes several times as
long. In eager mode an autograd function costs less than an operator does. `on_torch` says what each takes and returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kalmannorm.kernels.backends import backend_for
from kalmannorm.kernels.options import Filter

__all__ = ["layer", "link"]

_OPTIONS = "SymInt groups, float gain_slope, float gain_offset, float noise_scale, bool spread, float eps, bool relu"
_PARAMETERS = "Tensor? prior_mean, Tensor? prior_var, Tensor? gain, Tensor? noise, Tensor? weight, Tensor? bias"


def _operator(name: str, schema: str, compute: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """Define an operator: its schema, what it computes on any device, and empty outputs of the right shapes."""
    torch.library.define(f"kalmannorm::{name}", schema)
    torch.library.impl(f"kalmannorm::{name}", "CompositeExplicitAutograd", compute)
    torch.library.register_fake(f"kalmannorm::{name}", shapes)
    return getattr(torch.ops.kalmannorm, name).default


# ---- the link ----


def _link(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    out, rectified = backend_for(mean, var, weight, bias).link_forward(mean, var, weight, bias, relu)
    return out, mean.new_empty(0) if rectified is None else rectified


def _link_shapes(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    groups, channels = mean.shape[:2]
    return mean.new_empty(2, groups, weight.shape[0]), mean.new_empty((2, groups, channels) if relu else 0)


def _link_backward(mean: Tensor, var: Tensor, weight: Tensor, rectified: Tensor, d_out: Tensor, d_rectified: Tensor,
                   relu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    after, sent = (rectified, d_rectified.contiguous().unbind(0)) if relu else (None, (None, None))
    above = d_out.contiguous().unbind(0)
    below, d_weight = backend_for(mean, var, weight).link_backward(mean, var, weight, after, *above, *sent, relu)
    return below, d_weight


def _link_backward_shapes(mean: Tensor, var: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return mean.new_empty(2, *mean.shape[:2]), torch.empty_like(weight)


link = _operator(
    "link", "(Tensor mean, Tensor var, Tensor weight, Tensor? bias, bool relu) -> (Tensor, Tensor)", _link, _link_shapes
)  # fmt: skip
_backward_of_link = _operator(
    "link_backward",
    "(Tensor mean, Tensor var, Tensor weight, Tensor rectified, Tensor d_out, Tensor d_rectified, bool relu)"
    " -> (Tensor, Tensor)",
    _link_backward, _link_backward_shapes,
)  # fmt: skip


def _save_link(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mean, var, weight, bias, ctx.relu = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(mean, var, weight, output[1])


def _derive_link(ctx: Any, d_out: Tensor, d_rectified: Tensor) -> tuple[Tensor | None, ...]:
    mean, var, weight, rectified = ctx.saved_tensors
    below, d_weight = _backward_of_link(mean, var, weight, rectified, d_out, d_rectified, ctx.relu)
    d_mean, d_var = below.view(2, *mean.shape).unbind(0)
    return d_mean, d_var, d_weight, d_out[0].sum(0) if ctx.has_bias else None, None


torch.library.register_autograd("kalmannorm::link", _derive_link, setup_context=_save_link)


# ---- the layer, without running statistics ----


def _layer(x: Tensor, other: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None, gain: Tensor | None,
           noise: Tensor | None, weight: Tensor | None, bias: Tensor | None,
           *options: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    parameters = (prior_mean, prior_var, gain, noise, weight, bias)
    y, statistics = backend_for(x, *parameters).layer_forward(x, other, *parameters, None, Filter(*options))
    return y, statistics


def _layer_shapes(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty((6, others[7], x.shape[1]), dtype=dtype)


def _layer_backward(dy: Tensor, x: Tensor, y: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None,
                    gain: Tensor | None, noise: Tensor | None, weight: Tensor | None, bias: Tensor | None,
                    statistics: Tensor, d_statistics: Tensor, *options: Any) -> list[Tensor]:  # fmt: skip
    parameters = (prior_mean, prior_var, gain, noise, weight, bias)
    sent = d_statistics.contiguous()[:4].unbind(0)
    backward = backend_for(x, *parameters).layer_backward
    gradients = backward(dy, x, y, *parameters, statistics, *sent, Filter(*options))
    return [g for g in gradients if g is not None]


def _layer_backward_shapes(dy: Tensor, x: Tensor, y: Tensor | None, *others: Any) -> list[Tensor]:
    like = [x, *([] if y is None else [x]), *(t for t in others[:6] if t is not None)]
    return [torch.empty_like(t) for t in like]


layer = _operator(
    "layer", f"(Tensor x, Tensor? other, {_PARAMETERS}, {_OPTIONS}) -> (Tensor, Tensor)", _layer, _layer_shapes
)  # fmt: skip
_backward_of_layer = _operator(
    "layer_backward",
    f"(Tensor dy, Tensor x, Tensor? y, {_PARAMETERS}, Tensor statistics, Tensor d_statistics, {_OPTIONS}) -> Tensor[]",
    _layer_backward, _layer_backward_shapes,
)  # fmt: skip


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, other, *parameters = inputs[:8]
    ctx.options = inputs[8:]
    ctx.has_other = other is not None
    y = output[0] if ctx.has_other and ctx.options[-1] else None
    ctx.save_for_backward(x, *parameters, y, output[1])


def _derive_layer(ctx: Any, dy: Tensor, d_statistics: Tensor) -> tuple[Tensor | None, ...]:
    x, *parameters, y, statistics = ctx.saved_tensors
    found = iter(_backward_of_layer(dy, x, y, *parameters, statistics, d_statistics, *ctx.options))
    dx = next(found)
    d_other = next(found) if y is not None else dy if ctx.has_other else None
    return (dx, d_other, *(None if t is None else next(found) for t in parameters), *[None] * 7)


torch.library.register_autograd("kalmannorm::layer", _derive_layer, setup_context=_save_layer)
