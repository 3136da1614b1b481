"""Reductions along axes: means, sums, extremes and standard deviations of independent elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.rules.arithmetic import maximum, minimum, mul, neg
from kalmannorm.rules.pointwise import exp, log, piecewise
from kalmannorm.rules.pooling import largest_of
from kalmannorm.rules.shape import axes_of, drop, in_one_shape, varies
from kalmannorm.rules.table import Belief, aliases, belief_rule, rule

# The largest of elements lies this many standard deviations around one of them, at most.
_REACH = 7.0
_NODES = 129


def _over(x: Gaussian, dim: Any) -> tuple[list[int], int]:
    """The axes of a reduction, and how many elements of the activation it reduces to one. ``[]`` means all axes."""
    axes = axes_of(x, None if dim in ([], ()) else dim)
    return axes, math.prod([x.shape[d] for d in axes])


def _kept(reduced: Gaussian, axes: list[int], keepdim: bool) -> Gaussian:
    """A belief that has size 1 along these axes, with or without them."""
    return reduced if keepdim else drop(reduced, axes)


@belief_rule("mean")
def mean(x: Gaussian, dim: Any = None, keepdim: bool = False, *, dtype: object = None, axis: Any = None) -> Gaussian:
    """The mean of independent elements: ``m`` and ``v / count``."""
    axes, count = _over(x, dim if axis is None else axis)
    return _kept(Gaussian(x.mean.mean(axes, keepdim=True), x.var.mean(axes, keepdim=True) / count), axes, keepdim)


@belief_rule("sum")
def sum_(x: Gaussian, dim: Any = None, keepdim: bool = False, *, dtype: object = None, axis: Any = None) -> Gaussian:
    """The sum of independent elements: ``count m`` and ``count v``."""
    dim = dim if axis is None else axis
    return mul(mean(x, dim, keepdim), float(_over(x, dim)[1]))


def _largest(x: Gaussian, axes: list[int], count: int) -> Gaussian:
    """The largest of ``count`` independent elements along ``axes``, which keep size 1.

    Where the belief varies there, ``P(max < t)`` is a product of normal distributions, integrated by the trapezoid
    rule: ``E = low + int P(max > t) dt`` and ``E (max - low)^2 = int 2 (t - low) P(max > t) dt``.
    """
    uneven = [d for d in axes if varies(x, d)]
    if not uneven:
        return largest_of(x, count)
    x = in_one_shape(x.full(uneven))
    alike = count / math.prod([x.shape[d] for d in uneven])
    low = (x.mean - _REACH * x.std).amax(uneven, keepdim=True)
    reach = (x.mean + _REACH * x.std).amax(uneven, keepdim=True) - low
    above = reach.unsqueeze(-1) * torch.linspace(0, 1, _NODES, device=low.device, dtype=low.dtype)
    std = torch.maximum(x.std, reach.detach() * (0.1 / _NODES))  # a step that the nodes see, with finite slopes
    z = (low.unsqueeze(-1) + above - x.mean.unsqueeze(-1)) / std.unsqueeze(-1)
    share = -torch.expm1(alike * torch.special.log_ndtr(z).sum(uneven, keepdim=True))
    first, second = torch.trapezoid(share, above), torch.trapezoid(2 * above * share, above)
    return Gaussian(low + first, (second - first.square()).clamp_min(0))


@belief_rule("amax")
def amax(x: Gaussian, dim: Any = (), keepdim: bool = False) -> Gaussian:
    """The largest of independent elements: a point cloud's, or that of all channels."""
    axes, count = _over(x, dim)
    return _kept(_largest(x, axes, count), axes, keepdim)


@belief_rule("amin")
def amin(x: Gaussian, dim: Any = (), keepdim: bool = False) -> Gaussian:
    """The smallest of independent elements."""
    return neg(amax(neg(x), dim, keepdim))


def _extreme(along: Callable[..., Gaussian], of_two: Callable[..., Gaussian]) -> Callable[..., Gaussian]:
    def extreme(x: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None) -> Gaussian:
        """The largest or the smallest element along an axis, or of two tensors."""
        if isinstance(dim, Gaussian | Tensor):
            return of_two(x, dim)
        return along(x, dim if axis is None else axis, keepdim)

    return extreme


rule(*aliases("max"))(_extreme(amax, maximum))
rule(*aliases("min"))(_extreme(amin, minimum))


def _spread(x: Gaussian, dim: Any, lost: float, keepdim: bool, root: bool) -> Belief:
    """The variance ``S`` of ``n`` independent elements, divided by ``n - lost``, or its root.

    From the chi-squared distribution, with ``V`` the variance of the mixture of all elements:
    ``E S = V (n - 1) / (n - lost)`` and ``Var S = 2 (E S)^2 / (n - 1)``; ``E sqrt(S) = c4 sqrt(E S)``.
    """
    axes, n = _over(x, dim)
    if n - max(lost, 1) <= 0:
        return Unknown("the variance of too few elements")
    x = x.pool(axes)
    expected = Gaussian(x.mean, x.var * ((n - 1) / (n - lost)))
    if not root:
        return _kept(Gaussian(expected.var, expected.var.square() * (2 / (n - 1))), axes, keepdim)
    c4 = 1 - 1 / (4 * n) - 7 / (32 * n**2) - 19 / (128 * n**3)  # half a per cent off at two elements
    return _kept(Gaussian(expected.std * c4, expected.var * (1 - c4**2)), axes, keepdim)


def _of_spread(*, root: bool, with_mean: bool) -> Callable[..., Any]:
    def spread(x: Gaussian, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *,
               correction: float | None = None, axis: Any = None) -> Any:  # fmt: skip
        """The variance or the standard deviation of independent elements, as speaker networks pool it over time."""
        if isinstance(dim, bool):  # the older `var(unbiased)`
            dim, unbiased = None, dim
        dim = dim if axis is None else axis
        lost = (1.0 if unbiased else 0.0) if correction is None else float(correction)
        found = _spread(x, dim, lost, keepdim, root)
        return (found, mean(x, dim, keepdim)) if with_mean else found

    return spread


@belief_rule("norm")
def norm(x: Gaussian, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: object = None,
         dtype: object = None) -> Belief:  # fmt: skip
    """The Euclidean norm of independent elements; also the sum of their absolute values (``p = 1``).

    With ``Q`` the sum of squares, ``E Q = sum m^2 + v``, ``Var Q = sum 2 v^2 + 4 m^2 v``. ``sqrt(Q)`` has the moments
    of the root of a gamma distribution: with ``c = Var Q / (E Q)^2``, it loses the share ``c / 4 - c^2 / 32`` of the
    mean square ``E Q`` to the variance.
    """
    axes, _ = _over(x, dim)
    if p == 1:
        return sum_(piecewise(x, [0.0], [(0, -1, 0), (0, 1, 0)]).of(x.shape), axes, keepdim)
    if p not in (None, 2, "fro"):
        return Unknown(f"a norm with p={p}")
    tiny = torch.finfo(x.mean.dtype).tiny ** 0.5
    # Of elements of size 1: fourth powers leave the range of numbers soon.
    size = (x.mean.square() + x.var).mean(axes, keepdim=True).clamp_min(tiny).sqrt().detach()
    unit = Gaussian(x.mean / size, x.var / size.square())
    squares = sum_(mul(unit, unit).of(x.shape), axes, True)
    total = squares.mean.clamp_min(tiny)
    unevenly = squares.var / total.square()
    lost = unevenly / 4 - unevenly.square() / 32
    return _kept(Gaussian(size * (total * (1 - lost)).sqrt(), size.square() * total * lost), axes, keepdim)


@belief_rule(torch.linalg.vector_norm)
def vector_norm(x: Gaussian, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: object = None,
                out: object = None) -> Belief:  # fmt: skip
    """As :func:`norm`."""
    return norm(x, ord, dim, keepdim)


@belief_rule(torch.linalg.norm)
def vector_or_matrix_norm(x: Gaussian, ord: Any = None, dim: Any = None, keepdim: bool = False, *,
                          dtype: object = None, out: object = None) -> Belief:  # fmt: skip
    """As :func:`norm`, unless it is a matrix norm."""
    return norm(x, ord, dim, keepdim) if ord is None or isinstance(dim, int) else Unknown("a matrix norm")


@belief_rule("logsumexp")
def logsumexp(x: Gaussian, dim: Any, keepdim: bool = False) -> Belief:
    """The logarithm of a sum of log-normals, itself taken as one."""
    return log(sum_(exp(x).of(x.shape), dim, keepdim))


for _name in ("var", "std", "var_mean", "std_mean"):
    belief_rule(_name)(_of_spread(root="std" in _name, with_mean="mean" in _name))
