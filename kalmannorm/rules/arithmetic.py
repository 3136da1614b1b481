"""Sums, products, the larger and the smaller of two, and dropout.

Two activations are taken as independent of each other; one and the same activation on both sides
is recognized. A known tensor or number brings no variance of its own, see
:func:`kalmannorm.rules.shape.summarize`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Packed, Unknown
from kalmannorm.rules.pointwise import CASTS, CASTS_TO, inverse, prelu, quadrature, rrelu
from kalmannorm.rules.rectified import Rectified
from kalmannorm.rules.shape import align, of_rank, summarize
from kalmannorm.rules.table import RULES, Belief, aliases, belief_rule, belief_rules, rule

_Operand = Gaussian | Tensor | float


def pair(x: _Operand, y: _Operand) -> tuple[Gaussian, Gaussian]:
    """Both operands as beliefs that broadcast. At least one is a belief."""
    if not isinstance(x, Gaussian):
        assert isinstance(y, Gaussian)
        x = summarize(x, y)
    elif not isinstance(y, Gaussian):
        y = summarize(y, x)
    elif x.shape == y.shape and x.mean.shape == x.var.shape == y.mean.shape == y.var.shape:
        return x, y
    rank = max(x.ndim, y.ndim)
    first, second = align([b if b.ndim == rank else of_rank(b, rank) for b in (x, y)])
    return first, second


def _packed(x: _Operand, y: _Operand) -> tuple[Packed, Packed] | None:
    """Both, if each is known in one tensor and they have one shape, as beliefs from layers and links mostly do."""
    x, y = (each.evaluate() if isinstance(each, Rectified) else each for each in (x, y))
    if isinstance(x, Packed) and isinstance(y, Packed) and x.moments.shape == y.moments.shape:
        return (x, y) if x.shape == y.shape else None
    return None


@rule(*aliases("add", "add_", "__add__", "__radd__", "__iadd__"))
def add(x: _Operand, y: _Operand, *, alpha: float = 1, out: object = None) -> Gaussian:
    """``m1 + m2`` and ``v1 + v2``: a residual sum, a bias, a position embedding."""
    if x is y:
        return mul(x, 1 + alpha)
    if alpha == 1 and (both := _packed(x, y)) is not None:
        return Packed(both[0].moments + both[1].moments)
    first, second = pair(x, y)
    if alpha == 1:
        return Gaussian(first.mean + second.mean, first.var + second.var)
    return Gaussian(first.mean + alpha * second.mean, first.var + alpha**2 * second.var)


@belief_rule("neg", "neg_", "negative", "__neg__")
def neg(x: Gaussian) -> Gaussian:
    """``-m`` and ``v``."""
    return Gaussian(-x.mean, x.var, x.shape)


@rule(*aliases("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"))
def mul(x: _Operand, y: _Operand, *, out: object = None) -> Gaussian:
    """``m1 m2`` and ``v1 v2 + v1 m2^2 + v2 m1^2``: a scale, a gate, a mask."""
    if x is y and isinstance(x, Gaussian):
        return quadrature(x, lambda t: t**2)
    if isinstance(y, int | float) and isinstance(x, Gaussian):
        return Gaussian(x.mean * y, x.var * y**2)
    first, second = pair(x, y)
    a, b = first.mean.square(), second.mean.square()
    return Gaussian(first.mean * second.mean, first.var * second.var + first.var * b + second.var * a)


@rule(*aliases("div", "div_", "divide", "divide_", "true_divide", "__truediv__", "__itruediv__"))
def div(x: _Operand, y: _Operand, *, rounding_mode: str | None = None, out: object = None) -> Belief:
    """``m / c`` and ``v / c^2`` for a known ``c``. An activation counts as its root mean square, with its mean's sign.

    What a network divides by is mostly a norm, a deviation or a sum of what is positive, which varies little, or
    together with the numerator.
    """
    if rounding_mode is not None:
        return Unknown("division that rounds")
    return mul(x, _divisor(y))


def _divisor(y: _Operand) -> _Operand:
    """By how much a numerator is multiplied."""
    if not isinstance(y, Gaussian):
        return 1 / y
    square = (y.mean.square() + y.var).clamp_min(torch.finfo(y.mean.dtype).tiny)
    scale = torch.where(y.mean < 0, -1.0, 1.0) / square.sqrt()  # the slope of rsqrt would overflow sooner
    return Gaussian(scale, torch.zeros_like(scale), y.shape)


@rule(*aliases("addcmul", "addcmul_"))
def addcmul(x: _Operand, first: _Operand, second: _Operand, *, value: float = 1, out: object = None) -> Gaussian:
    """``x + value first second``, independent unless they are one and the same."""
    if first is second is x and isinstance(x, Gaussian):
        return quadrature(x, lambda t: t + value * t**2)
    if x is first or x is second:  # x (1 + value other)
        other = second if x is first else first
        return mul(x, add(mul(other, value), 1.0) if isinstance(other, Gaussian) else 1 + value * other)
    product: Any = mul(first, second) if isinstance(first, Gaussian) or isinstance(second, Gaussian) else first * second
    return add(x, product, alpha=value)


@rule(*aliases("lerp", "lerp_"))
def lerp(x: _Operand, end: _Operand, weight: Any) -> Belief:
    """``(1 - w) x + w end`` for a known ``w``: a moving average."""
    if isinstance(weight, Gaussian):
        return Unknown("an interpolation by an activation")
    if x is end:
        return add(x, 0.0)
    first, second = (mul(t, w) if isinstance(t, Gaussian) else t * w for t, w in ((x, 1 - weight), (end, weight)))
    return add(first, second)


@rule(*aliases("maximum", "fmax"))
def maximum(x: _Operand, y: _Operand, *, out: object = None) -> Gaussian:
    """The larger of two: with ``t^2 = v1 + v2`` and ``a = (m1 - m2) / t``, ``E = m1 Phi(a) + m2 Phi(-a) + t phi(a)``.

    Clark, "The greatest of a finite set of random variables", 1961, Eq. 2 to 4.
    """
    if x is y:
        return add(x, 0.0)
    first, second = pair(x, y)
    apart = first.mean - second.mean
    spread = Gaussian(apart, first.var + second.var).std
    a = apart / torch.maximum(spread, apart.detach().abs() * 1e-6)  # finite slopes without a variance
    more, less = torch.special.ndtr(a), torch.special.ndtr(-a)
    tail = spread * torch.exp(-0.5 * a.square()) * (1 / math.sqrt(2 * math.pi))
    mean = second.mean + apart * more + tail
    # The variance of the two means, of which either may be the larger, without large numbers that cancel.
    between = apart.square() * more * less + apart * tail * (less - more) - tail.square()
    return Gaussian(mean, (first.var * more + second.var * less + between).clamp_min(0))


@rule(*aliases("minimum", "fmin"))
def minimum(x: _Operand, y: _Operand, *, out: object = None) -> Gaussian:
    """The smaller of two, see :func:`maximum`."""
    if x is y:
        return add(x, 0.0)
    first, second = (neg(t) if isinstance(t, Gaussian) else -t for t in (x, y))
    return neg(maximum(first, second))


@rule(*aliases("gt", "ge", "greater", "greater_equal", "__gt__", "__ge__"))
def greater(x: _Operand, y: _Operand) -> Gaussian:
    """Whether ``x > y``, with ``p = Phi((m1 - m2) / sqrt(v1 + v2))``: mean ``p`` and variance ``p (1 - p)``."""
    first, second = pair(x, y)
    apart = Gaussian(first.mean - second.mean, first.var + second.var)
    a = apart.mean / apart.std
    return Gaussian(torch.special.ndtr(a), torch.special.ndtr(a) * torch.special.ndtr(-a))


@rule(*aliases("eq", "__eq__"))
def equal(x: _Operand, y: _Operand) -> Belief:
    """Never, of an activation, which has a density, and a known tensor."""
    if isinstance(x, Gaussian) and isinstance(y, Gaussian):
        return Unknown("whether two activations are equal")  # as peaks are to the largest around them
    return mul(greater(x, y), 0.0)


@rule(*aliases("ne", "not_equal", "__ne__"))
def unequal(x: _Operand, y: _Operand) -> Belief:
    """Always, see :func:`equal`."""
    found = equal(x, y)
    return negation(found) if isinstance(found, Gaussian) else found


@belief_rule("logical_not", "logical_not_", "bitwise_not", "bitwise_not_", "__invert__")
def negation(x: Gaussian) -> Gaussian:
    """Of a mask: ``1 - m`` and ``v``."""
    return Gaussian(1 - x.mean, x.var, x.shape)


@rule(*aliases("logical_or", "logical_or_", "bitwise_or", "bitwise_or_", "__or__", "__ior__"))
def disjunction(x: _Operand, y: _Operand) -> Gaussian:
    """One of two independent masks, or both: not both are false."""
    first, second = (negation(each) for each in pair(x, y))
    return negation(mul(first, second))


@belief_rule("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout")
def dropout(x: Gaussian, p: float = 0.5, training: bool = True, inplace: bool = False) -> Gaussian:
    """Zero with probability ``p``, divide by ``1 - p``: ``m`` and ``(v + p m^2) / (1 - p)``."""
    if not training or p == 0:
        return x
    if p == 1:
        return x.map(lambda t: t * 0)
    return Gaussian(x.mean, (x.var + p * x.mean.square()) / (1 - p))


belief_rules("by another rule", {
    "heaviside": lambda x, values: greater(x, 0.0),
    "__rtruediv__": lambda x, y: mul(inverse(x), y),
})  # fmt: skip
belief_rules("by another rule", {
    "sub sub_ subtract subtract_ __sub__ __isub__": lambda x, y, *, alpha=1, out=None: add(x, y, alpha=-alpha),
    "rsub __rsub__": lambda x, y, *, alpha=1: add(y, x, alpha=-alpha),
    "addcdiv addcdiv_": lambda x, first, second, *, value=1, out=None: addcmul(x, first, _divisor(second), value=value),
    "lt le less less_equal __lt__ __le__": lambda x, y: greater(y, x),
    # Of two independent masks.
    "logical_and logical_and_ bitwise_and bitwise_and_ __and__ __iand__": lambda x, y: mul(x, y),  # noqa: PLW0108
}, alone=False)  # fmt: skip

PRELU = frozenset(function for function, its in RULES.items() if its is prelu)
_THE_SAME = frozenset(aliases("clone", "contiguous", "detach", *CASTS, *CASTS_TO))
# Functions that are lines, if they have one argument that is an activation.
LINES = _THE_SAME | frozenset(
    f for f, its in RULES.items() if its.__name__ in ("add", "sub", "rsub", "neg", "mul", "div")
)  # fmt: skip
# Functions each of whose outputs depends on one element of each activation among their arguments; but for random ones.
ELEMENTWISE = _THE_SAME | frozenset(aliases("where", "masked_fill", "masked_fill_")) | frozenset(
    f for f, its in RULES.items()
    if its.__module__ in (__name__, quadrature.__module__) and its not in (dropout, rrelu)
)  # fmt: skip
# As these, if they have several arguments that are activations.
JOINT = ELEMENTWISE | frozenset(aliases("max", "min"))
