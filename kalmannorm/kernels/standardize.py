"""``y = gamma (x - m) / sqrt(v + eps) + beta`` with a gradient for ``m`` and ``v`` too.

The backward pass of torch's batch normalization with given statistics returns ``sum dy`` and
``sum dy (x - m) / s`` a channel along with ``dx``, all that the gradients of the statistics need:

    d m = -gamma / s sum dy,    d v = -gamma / (2 s^2) sum dy (x - m) / s,    s = sqrt(v + eps).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.kernels.autograd import differentiable_gradients, is_transformed, needs_torchs_functions


def _plain(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    scale = weight * torch.rsqrt(var + eps)
    shape = (1, -1, *[1] * (x.ndim - 2))
    return torch.addcmul((bias - mean * scale).view(shape), x, scale.view(shape)).to(x.dtype)


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,  # type: ignore[override]
                eps: float) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, mean, var, weight, bias)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, var, weight, _ = ctx.saved_tensors
        if needs_torchs_functions(dy):
            inputs = (*ctx.saved_tensors, ctx.eps)
            return tuple(differentiable_gradients(lambda *given: (_plain(*given),), inputs, (dy,)))
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        inverse = torch.rsqrt(var + ctx.eps)
        scale = weight * inverse
        d_mean = -scale * d_bias
        d_var = -0.5 * scale * inverse * d_weight
        return dx, d_mean, d_var, d_weight, d_bias, None


def standardize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize ``(N, C, *)`` by given vectors, ``(C,)`` each and at least float32; shaped and typed as ``x``."""
    if is_transformed() or x.numel() == 0:  # one of several processes may have nothing, which torch's kernel rejects
        return _plain(x, mean, var, weight, bias, eps)
    if torch.is_grad_enabled():
        return _Standardize.apply(x, mean, var, weight, bias, eps)  # type: ignore[no-untyped-call, no-any-return]
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
