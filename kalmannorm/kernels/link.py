"""From one normalization layer to the next: a Gaussian, rectified or not, through a convolution or linear map.

    m' = sum_k W m + b        v' = sum_k W^2 v

over inputs and taps ``k``. Each pass reads the weights, by far the largest tensors here, once. With incoming
gradients ``dm`` and ``dv``,

    d m = dm W,    d v = dv W^2,    d W = dm^T m + 2 W * (dv^T v).

The ReLU before is that of `kalmannorm.kernels.rectify`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kalmannorm.kernels import on_torch, operators
from kalmannorm.kernels.autograd import differentiable_gradients, is_transformed, needs_torchs_functions
from kalmannorm.kernels.backends import backend_for
from kalmannorm.kernels.memory_format import as_dense, in_type


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moments: Tensor, weight: Tensor, bias: Tensor | None, relu: bool,  # type: ignore[override]
                backend: ModuleType) -> Any:  # fmt: skip
        out, after = backend.link_forward(moments, weight, bias, relu)
        ctx.save_for_backward(moments, weight, bias, after)
        ctx.relu, ctx.backend = relu, backend
        ctx.set_materialize_grads(False)
        return out, after

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_after: Tensor | None) -> Any:  # type: ignore[override]
        moments, weight, bias, after = ctx.saved_tensors  # once: a checkpoint allows no more
        if needs_torchs_functions(d_out, d_after):
            inputs = (moments, weight, bias, ctx.relu)
            return (*differentiable_gradients(on_torch.link_forward, inputs, (d_out, d_after)), None)
        if d_out is None:
            d_out = moments.new_zeros(2, moments.shape[1], weight.shape[0])
        below, d_weight = ctx.backend.link_backward(moments, weight, after, d_out, d_after, ctx.relu)
        return below, d_weight, None if bias is None else on_torch.link_bias_gradient(d_out), None, None


def link(moments: Tensor, weight: Tensor, bias: Tensor | None = None,
         relu: bool = False) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Mean and variance of sums of independent terms, weighted by a matrix or a convolution's filter.

    All taps of a weight ``(C_out, C_in, *taps)`` meet the same mean and variance, ``(2, S, C_in, 1, ...)``, which are
    at least float32; with ``relu``, rectified ones. Returns as :func:`kalmannorm.kernels.formulas.link_forward`.
    """
    if moments.shape[0] != 2 or moments.shape[2] != weight.shape[1]:
        raise ValueError(
            f"got moments of shape {tuple(moments.shape)}, expected (2, S, {weight.shape[1]}, ...): a mean and a "
            f"variance of as many channels as the weight of shape {tuple(weight.shape)} has"
        )
    weight = in_type(weight, moments.dtype)
    bias = None if bias is None else in_type(bias, moments.dtype)
    if torch.compiler.is_compiling():
        out, after = operators.link(moments, weight, bias, relu)
        return out, after if relu else None
    if is_transformed():
        return on_torch.link_forward(moments, weight, bias, relu)
    moments, weight = moments.contiguous(), as_dense(weight)
    backend = backend_for(moments, weight, bias)
    return _Link.apply(moments, weight, bias, relu, backend)  # type: ignore[no-untyped-call, no-any-return]
