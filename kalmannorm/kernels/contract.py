"""Both moments through a matrix: ``m W^T`` and ``v (W^2)^T``.

Weights are by far the largest tensors that a belief meets, and autograd would go over them, and over
copies of them, a dozen times. With incoming gradients ``dm`` and ``dv``, the backward pass is

    d mean = dm W,    d var = dv W^2,    d W = dm^T m + 2 W * (dv^T v).

On a CPU each pass goes over the matrix once, block by block: ``W`` is read from memory a single time and
``W^2`` never leaves the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.kernels.apply import direct

__all__ = ["contract"]

_BLOCK = 2**18  # elements: a mebibyte in float32


def _row_blocks(weight: Tensor) -> int:
    """How many rows to take at a time; all, where blocks don't help or autograd must see through."""
    rows, columns = weight.shape
    if weight.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return rows
    return rows if rows * columns <= _BLOCK else max(1, _BLOCK // columns)


def _at_every_tap(moment: Tensor, matrix: Tensor) -> Tensor:
    """``(S, in)`` to ``(S, in * k)``: each tap of a channel meets the same moment."""
    taps = matrix.shape[1] // moment.shape[1]
    return moment if taps == 1 else moment.repeat_interleave(taps, 1)


def _over_taps(gradient: Tensor, like: Tensor) -> Tensor:
    """The adjoint: ``(S, in * k)`` to ``(S, in)``."""
    return gradient if gradient.shape == like.shape else gradient.unflatten(1, (like.shape[1], -1)).sum(-1)


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(mean: Tensor, var: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        matrix = weight.flatten(1)
        mean, var = _at_every_tap(mean, matrix), _at_every_tap(var, matrix)
        rows = _row_blocks(matrix)
        if rows >= matrix.shape[0]:
            return F.linear(mean, matrix), F.linear(var, matrix.square())
        blocks = [(F.linear(mean, w), F.linear(var, w.square())) for w in matrix.split(rows)]
        means, variances = zip(*blocks, strict=True)
        return torch.cat(means, 1), torch.cat(variances, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        mean_in, var_in, weight = ctx.saved_tensors
        matrix = weight.flatten(1)
        mean, var = _at_every_tap(mean_in, matrix), _at_every_tap(var_in, matrix)
        rows = _row_blocks(matrix)
        if rows >= matrix.shape[0]:
            d_weight = torch.addmm((d_var.mT @ var) * matrix, d_mean.mT, mean, beta=2).view(weight.shape)
            below_mean, below_var = d_mean @ matrix, d_var @ matrix.square()
        else:
            # A tensor of its own, not a view of one: only then does autograd add the convolution's own
            # gradient to it in place.
            d_weight = torch.empty(weight.shape, dtype=weight.dtype)
            below_mean, below_var = torch.zeros_like(mean), torch.zeros_like(var)
            parts = (matrix, d_weight.view(matrix.shape), d_mean.mT, d_var.mT)
            for w, d_w, dm, dv in zip(*(t.split(rows) for t in parts), strict=True):
                below_mean.addmm_(dm.mT, w)
                below_var.addmm_(dv.mT, w.square())
                torch.mm(dv, var, out=d_w).mul_(w).addmm_(dm, mean, beta=2)
        return _over_taps(below_mean, mean_in), _over_taps(below_var, var_in), d_weight


_apply = direct(_Contract)


def contract(mean: Tensor, var: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of sums of independent terms, weighted by a matrix or a convolution's filter.

    Args:
        mean: ``(S, in)``.
        var: ``(S, in)``.
        weight: ``(out, in)``, or ``(out, in, *k)``, whose taps all meet the same moments.

    Returns:
        ``mean @ w.T`` and ``var @ w2.T``, each ``(S, out)``, for ``w`` the weight summed over its taps and
        ``w2`` its square summed over them.
    """
    result: tuple[Tensor, Tensor] = _apply(mean, var, weight)
    return result
