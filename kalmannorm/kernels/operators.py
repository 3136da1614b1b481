"""The layer and the link as operators of torch's, which ``torch.compile`` keeps whole, for the functions of `on_torch`.

Left to itself, the compiler makes some hundred small operations of each, and takes several times as long. In eager mode
an autograd function costs less. Any strides are taken, as the compiler keeps activations and weights channels-last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kalmannorm.kernels.arguments import Given, Options
from kalmannorm.kernels.backends import backend_for
from kalmannorm.kernels.formulas import carried, to_groups
from kalmannorm.kernels.memory_format import as_dense
from kalmannorm.kernels.on_torch import link_bias_gradient

_OPTIONS = (
    "SymInt groups, SymInt gain_samples, float gain_slope, float gain_offset, float noise_scale, bool spread, "
    "float eps, bool relu"
)
_PARAMETERS = "Tensor? prior, Tensor? shift, Tensor? scale, Tensor? gain, Tensor? noise, Tensor? weight, Tensor? bias"


def _operator(name: str, schema: str, compute: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """Define an operator by its schema, its implementation for any device, and a function that makes empty outputs."""
    torch.library.define(f"kalmannorm::{name}", schema, tags=torch.Tag.flexible_layout)
    torch.library.impl(f"kalmannorm::{name}", "CompositeExplicitAutograd", compute)
    torch.library.register_fake(f"kalmannorm::{name}", shapes)
    return getattr(torch.ops.kalmannorm, name).default


# ---- the link ----


def _link(moments: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    moments, weight = moments.contiguous(), as_dense(weight)
    bias = None if bias is None else bias.contiguous()
    out, after = backend_for(moments, weight, bias).link_forward(moments, weight, bias, relu)
    return out, moments.new_empty(0) if after is None else after


def _link_shapes(moments: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    _, groups, _, *ones = moments.shape
    out = moments.new_empty(2, groups, weight.shape[0], *ones)
    return out, torch.empty_like(moments.contiguous()) if relu else moments.new_empty(0)


def _link_backward(moments: Tensor, weight: Tensor, after: Tensor, d_out: Tensor, d_after: Tensor,
                   relu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    known, sent = (after, d_after) if relu else (None, None)
    moments, weight = moments.contiguous(), as_dense(weight)
    below, d_weight = backend_for(moments, weight).link_backward(moments, weight, known, d_out, sent, relu)
    return below, d_weight


def _link_backward_shapes(moments: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(moments.contiguous()), torch.empty_like(as_dense(weight))


link = _operator(
    "link", "(Tensor moments, Tensor weight, Tensor? bias, bool relu) -> (Tensor, Tensor)", _link, _link_shapes
)  # fmt: skip
_backward_of_link = _operator(
    "link_backward",
    "(Tensor moments, Tensor weight, Tensor after, Tensor d_out, Tensor d_after, bool relu) -> (Tensor, Tensor)",
    _link_backward, _link_backward_shapes,
)  # fmt: skip


def _save_link(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    moments, weight, bias, ctx.relu = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(moments, weight, output[1])


def _derive_link(ctx: Any, d_out: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
    below, d_weight = _backward_of_link(*ctx.saved_tensors, d_out, d_after, ctx.relu)
    return below, d_weight, link_bias_gradient(d_out) if ctx.has_bias else None, None


torch.library.register_autograd("kalmannorm::link", _derive_link, setup_context=_save_link)


# ---- the layer, without running statistics ----


def _contiguous(vectors: Sequence[Tensor | None]) -> Given:
    return Given(*[None if t is None else t.contiguous() for t in vectors])


def _layer(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, given, (posterior, *options) = as_dense(x), _contiguous(others[:7]), others[7:]
    y, statistics = backend_for(x, *given).layer_forward(x, given, None, Options(*options).for_kernels())
    return y, carried(statistics, x, posterior).clone(), statistics


def _layer_shapes(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    statistics = x.new_empty((6, others[8], x.shape[1]), dtype=dtype)
    return torch.empty_like(as_dense(x)), carried(statistics, x, others[7]).clone(), statistics


def _layer_backward(dy: Tensor, x: Tensor, *others: Any) -> list[Tensor]:
    x, given, (d_belief, statistics, posterior, *options) = as_dense(x), _contiguous(others[:7]), others[7:]
    constants = Options(*options).for_kernels()
    d_belief = to_groups(d_belief, constants.groups, posterior)
    found = backend_for(x, *given).layer_backward(dy, x, given, statistics, d_belief, posterior, constants)
    return [g for g in found if g is not None]


def _with_gradients(given: Sequence[Any]) -> list[Any]:
    """Those that have gradients: all but the correction of the prior."""
    return [given[0], *given[3:7]]


def _layer_backward_shapes(dy: Tensor, x: Tensor, *others: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in (as_dense(x), *_with_gradients(_contiguous(others[:7]))) if t is not None]


layer = _operator(
    "layer", f"(Tensor x, {_PARAMETERS}, bool posterior, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", _layer, _layer_shapes
)
_backward_of_layer = _operator(
    "layer_backward",
    f"(Tensor dy, Tensor x, {_PARAMETERS}, Tensor d_belief, Tensor statistics, bool posterior,"
    f" {_OPTIONS}) -> Tensor[]",
    _layer_backward, _layer_backward_shapes,
)  # fmt: skip


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.options = inputs[8:]
    ctx.save_for_backward(*inputs[:8], output[2])


def _derive_layer(ctx: Any, dy: Tensor, d_belief: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, *parameters, statistics = ctx.saved_tensors
    found = iter(_backward_of_layer(dy, x, *parameters, d_belief, statistics, *ctx.options))
    dx = next(found)
    d_prior, *others = (None if t is None else next(found) for t in _with_gradients(parameters))
    return dx, d_prior, None, None, *others, *[None] * 9


torch.library.register_autograd("kalmannorm::layer", _derive_layer, setup_context=_save_layer)
