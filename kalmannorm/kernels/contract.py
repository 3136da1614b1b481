"""Both moments through a matrix: ``m W^T`` and ``v (W^2)^T``.

Weights are by far the largest tensors that a belief meets, and autograd would go over them, and over
copies of them, a dozen times. With incoming gradients ``dm`` and ``dv``, the backward pass is

    d mean = dm W,    d var = dv W^2,    d W = dm^T m + 2 W * (dv^T v).

On a CPU both passes go over the matrix block by block, so that ``W^2`` never leaves the cache.
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


class _Contract(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, var: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        matrix = weight.flatten(1)
        rows = _row_blocks(matrix)
        if rows >= matrix.shape[0]:
            return F.linear(mean, matrix), F.linear(var, matrix.square())
        return F.linear(mean, matrix), torch.cat([F.linear(var, w.square()) for w in matrix.split(rows)], 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        mean, var, weight = ctx.saved_tensors
        matrix = weight.flatten(1)
        rows = _row_blocks(matrix)
        if rows >= matrix.shape[0]:
            d_matrix = torch.addmm((d_var.mT @ var) * matrix, d_mean.mT, mean, beta=2)
            return d_mean @ matrix, d_var @ matrix.square(), d_matrix.view(weight.shape)
        # A tensor of its own, not a view of one: only then does autograd add the convolution's own
        # gradient to it in place.
        d_weight = torch.empty(weight.shape, dtype=weight.dtype)
        d_prior_var = torch.zeros_like(var)
        parts = (matrix, d_weight.view(matrix.shape), d_mean.mT, d_var.mT)
        for w, d_w, dm, dv in zip(*(t.split(rows) for t in parts), strict=True):
            d_prior_var.addmm_(dv.mT, w.square())
            torch.mm(dv, var, out=d_w).mul_(w).addmm_(dm, mean, beta=2)
        return d_mean @ matrix, d_prior_var, d_weight


_apply = direct(_Contract)


def contract(mean: Tensor, var: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of sums of independent terms, weighted by a matrix.

    Args:
        mean: ``(S, in)``.
        var: ``(S, in)``.
        weight: ``(out, in)``, or any ``(out, ...)`` with ``in`` elements in each row.

    Returns:
        ``mean @ weight.T`` and ``var @ weight.square().T``, each ``(S, out)``.
    """
    result: tuple[Tensor, Tensor] = _apply(mean, var, weight)
    return result
