"""Normalization layers of torch that stay in a network: frozen ones are affine, the others standardize."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.rules.arithmetic import add, mul
from kalmannorm.rules.shape import axes_of, in_one_shape, summarize
from kalmannorm.rules.table import Belief, belief_rule


def _along_channels(vector: Tensor | None, x: Gaussian, default: float) -> Tensor | float:
    return default if vector is None else vector.reshape(-1, *[1] * (x.ndim - 2))


def _affine(x: Gaussian, scale: Tensor | float, shift: Tensor | float) -> Gaussian:
    return add(mul(x, summarize(scale, x)), summarize(shift, x))


def _standardized(x: Gaussian, weight: Tensor | float, bias: Tensor | float) -> Gaussian:
    """Zero mean and unit variance, then the affine map: ``beta`` and ``gamma^2``."""
    return _affine(Gaussian(torch.zeros_like(x.mean), torch.ones_like(x.var)), weight, bias)


@belief_rule(F.batch_norm)  # torch.batch_norm takes its arguments in another order
def batch_norm(x: Gaussian, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
               bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
               eps: float = 1e-5, *args: Any) -> Gaussian:  # fmt: skip
    """With running statistics an affine map; with batch statistics the output is standardized."""
    scale, shift = _along_channels(weight, x, 1.0), _along_channels(bias, x, 0.0)
    if training or running_mean is None or running_var is None:
        return _standardized(x, scale, shift)
    scale = scale * _along_channels((running_var.to(x.var.dtype) + eps).rsqrt(), x, 1.0)
    shift = shift - _along_channels(running_mean, x, 0.0) * scale
    return _affine(x, scale, shift)


def _standardized_along(x: Gaussian, dims: Sequence[int], eps: float) -> Gaussian:
    """``(x - M) / sqrt(V + eps)`` with mean and variance of the mixture along ``dims``, as if of many elements."""
    x = in_one_shape(x.full(dims))
    mixture = x.pool(dims)
    scale = (mixture.var + eps).rsqrt()
    return Gaussian((x.mean - mixture.mean) * scale, x.var * scale.square())


@belief_rule("group_norm")
def group_norm(x: Gaussian, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5, *args: Any) -> Gaussian:  # fmt: skip
    """Standardized by the mixture of a group's channels and pixels; then the affine map."""
    groups = x.full([1]).map(lambda t: t.unflatten(1, (num_groups, -1)))
    each = _standardized_along(groups, range(2, groups.ndim), eps).map(lambda t: t.flatten(1, 2))
    return _affine(each, _along_channels(weight, x, 1.0), _along_channels(bias, x, 0.0))


@belief_rule(F.instance_norm)  # here too
def instance_norm(x: Gaussian, running_mean: Tensor | None = None, running_var: Tensor | None = None,
                  weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
                  momentum: float = 0.1, eps: float = 1e-5, *args: Any) -> Gaussian:  # fmt: skip
    """As :func:`batch_norm`, whose groups are then single samples."""
    return batch_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@belief_rule("layer_norm")
def layer_norm(x: Gaussian, normalized_shape: Sequence[int], weight: Tensor | None = None,
               bias: Tensor | None = None, eps: float = 1e-5, *args: Any) -> Gaussian:  # fmt: skip
    """Standardized by the mixture along the last axes; then the affine map."""
    each = _standardized_along(x, range(x.ndim - len(normalized_shape), x.ndim), eps)
    return _affine(each, 1.0 if weight is None else weight, 0.0 if bias is None else bias)


def _sum_of_squares(x: Gaussian, dims: list[int]) -> Tensor:
    """``sum m^2 + v`` along some axes."""
    full = x.full(dims)
    return (full.mean.square() + full.var).sum(dims, keepdim=True)


@belief_rule(F.normalize)
def normalize(x: Gaussian, p: float = 2.0, dim: int | Sequence[int] = 1, eps: float = 1e-12,
              out: object = None) -> Belief:  # fmt: skip
    """``x / |x|``: divided by the root of the norm's mean square."""
    if p != 2.0:
        return Unknown(f"normalize with p={p}")
    return mul(x, _sum_of_squares(x, axes_of(x, dim)).clamp_min(eps**2).rsqrt())


@belief_rule("rms_norm")
def rms_norm(x: Gaussian, normalized_shape: Sequence[int], weight: Tensor | None = None,
             eps: float | None = None) -> Gaussian:  # fmt: skip
    """``x`` over its root mean square along the last axes, times ``weight``."""
    dims = list(range(x.ndim - len(normalized_shape), x.ndim))
    mean_square = _sum_of_squares(x, dims) / math.prod(normalized_shape)
    normalized = mul(x, (mean_square + (torch.finfo(x.mean.dtype).eps if eps is None else eps)).rsqrt())
    return normalized if weight is None else mul(normalized, summarize(weight, x.full(dims)))
