"""Sums, products, means and dropout.

Two activations are taken as independent of each other; one and the same activation on both sides
is recognized. A known tensor or number brings no variance of its own, see
:func:`kalmannorm.rules.shape.summarize`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kalmannorm.gaussian import Gaussian, Packed, Unknown
from kalmannorm.rules.pointwise import Deferred, power
from kalmannorm.rules.pooling import largest_of
from kalmannorm.rules.shape import align, summarize
from kalmannorm.rules.table import Belief, aliases, rule

_Operand = Belief | Tensor | float


def _are_alike(x: Gaussian, y: Gaussian) -> bool:
    return x.mean.shape == x.var.shape == y.mean.shape == y.var.shape


def _pair(x: _Operand, y: _Operand) -> tuple[Gaussian, Gaussian]:
    """Both operands as beliefs that broadcast."""
    assert not isinstance(x, Unknown)
    assert not isinstance(y, Unknown)
    if isinstance(x, Gaussian) and isinstance(y, Gaussian) and x.shape == y.shape and _are_alike(x, y):
        return x, y
    if not isinstance(x, Gaussian):
        assert isinstance(y, Gaussian)
        x = summarize(x, y)
    elif not isinstance(y, Gaussian):
        y = summarize(y, x)
    rank = max(x.ndim, y.ndim)
    x, y = (b.map(lambda t: t.reshape(*[1] * (rank - t.ndim), *t.shape)) if b.ndim < rank else b for b in (x, y))
    first, second = align([x, y])
    return first, second


def _packed(x: _Operand, y: _Operand) -> tuple[Packed, Packed] | None:
    """Both, where both are known in one tensor, of one shape: what comes from layers, or from the links between."""
    x, y = (each.evaluate() if isinstance(each, Deferred) else each for each in (x, y))
    if isinstance(x, Packed) and isinstance(y, Packed) and x.moments.shape == y.moments.shape:
        return (x, y) if x.shape == y.shape else None
    return None


@rule(*aliases("add", "add_", "__add__", "__radd__", "__iadd__"))
def add(x: _Operand, y: _Operand, *, alpha: float = 1, out: object = None) -> Belief:
    """``m1 + m2`` and ``v1 + v2``: a residual sum, a bias, a position embedding."""
    if x is y:
        return mul(x, 1 + alpha)
    if alpha == 1 and (both := _packed(x, y)) is not None:
        return Packed(both[0].moments + both[1].moments)
    first, second = _pair(x, y)
    if alpha == 1:
        return Gaussian(first.mean + second.mean, first.var + second.var)
    return Gaussian(first.mean + alpha * second.mean, first.var + alpha**2 * second.var)


@rule(*aliases("sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"))
def sub(x: _Operand, y: _Operand, *, alpha: float = 1, out: object = None) -> Belief:
    """``m1 - m2`` and ``v1 + v2``."""
    return add(x, y, alpha=-alpha)


@rule(*aliases("rsub", "__rsub__"))
def rsub(x: _Operand, y: _Operand, *, alpha: float = 1) -> Belief:
    """``m2 - m1`` and ``v1 + v2``."""
    return add(y, x, alpha=-alpha)


@rule(*aliases("neg", "neg_", "negative", "__neg__"))
def neg(x: Gaussian) -> Gaussian:
    """``-m`` and ``v``."""
    return Gaussian(-x.mean, x.var)


@rule(*aliases("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"))
def mul(x: _Operand, y: _Operand, *, out: object = None) -> Belief:
    """``m1 m2`` and ``v1 v2 + v1 m2^2 + v2 m1^2``: a scale, a gate, a mask."""
    if x is y and isinstance(x, Gaussian):
        return power(x, 2)
    if isinstance(y, int | float) and isinstance(x, Gaussian):
        return Gaussian(x.mean * y, x.var * y**2)
    first, second = _pair(x, y)
    a, b = first.mean.square(), second.mean.square()
    return Gaussian(
        first.mean * second.mean, first.var * second.var + first.var * b + second.var * a
    )


@rule(*aliases("div", "div_", "divide", "divide_", "true_divide", "__truediv__", "__itruediv__"))
def div(x: _Operand, y: _Operand, *, rounding_mode: str | None = None, out: object = None) -> Belief:
    """``m / c`` and ``v / c^2`` for a known ``c``."""
    if isinstance(y, Gaussian):
        return Unknown("division by an activation, whose inverse has no mean")
    if rounding_mode is not None:
        return Unknown("division that rounds")
    assert not isinstance(y, Unknown)
    return mul(x, 1 / y)


def _reduced(x: Gaussian, dim: Any) -> list[int]:
    dims = range(x.ndim) if dim is None or dim == [] or dim == () else dim
    return sorted({d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)})


def _drop(x: Gaussian, dims: Sequence[int], keepdim: bool) -> Gaussian:
    if keepdim:
        return x
    return x.map(lambda t: t.reshape([n for d, n in enumerate(t.shape) if d not in dims]))


@rule(*aliases("mean"))
def mean(x: Gaussian, dim: Any = None, keepdim: bool = False, *, dtype: object = None, axis: Any = None) -> Belief:
    """The mean of independent elements: ``m`` and ``v / count``."""
    dims = _reduced(x, dim if axis is None else axis)
    count = math.prod([x.shape[d] for d in dims])
    averaged = Gaussian(x.mean.mean(dims, keepdim=True), x.var.mean(dims, keepdim=True) / count)
    return _drop(averaged, dims, keepdim)


@rule(*aliases("sum"))
def sum_(x: Gaussian, dim: Any = None, keepdim: bool = False, *, dtype: object = None, axis: Any = None) -> Belief:
    """The sum of independent elements: ``count m`` and ``count v``."""
    count = math.prod([x.shape[d] for d in _reduced(x, dim if axis is None else axis)])
    return mul(mean(x, dim, keepdim, axis=axis), float(count))


@rule(*aliases("amax"))
def amax(x: Gaussian, dim: Any = (), keepdim: bool = False) -> Belief:
    """The largest of independent elements with one belief."""
    dims = _reduced(x, dim)
    if any(x.mean.shape[d] > 1 or x.var.shape[d] > 1 for d in dims):
        return Unknown("a maximum along an axis where the belief varies")
    return _drop(largest_of(x, math.prod([x.shape[d] for d in dims])), dims, keepdim)


@rule(*aliases("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"))
def dropout(x: Gaussian, p: float = 0.5, training: bool = True, inplace: bool = False) -> Gaussian:
    """Zero with probability ``p``, divide by ``1 - p``: ``m`` and ``(v + p m^2) / (1 - p)``."""
    if not training or p == 0:
        return x
    if p == 1:
        return x.map(lambda t: t * 0)
    return Gaussian(x.mean, (x.var + p * x.mean.square()) / (1 - p))
