"""Activations: the ReLU family in closed form, smooth functions by quadrature.

Each output element depends on one input element, so a rule assumes only that it is Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.kernels import on_cpu
from kalmannorm.kernels.activation import activation, rectify
from kalmannorm.kernels.autograd import is_transformed
from kalmannorm.kernels.rectify import Moments, Slopes
from kalmannorm.rules.rectified import Rectified
from kalmannorm.rules.table import Belief, aliases, belief_rule, belief_rules

__all__ = ["piecewise", "quadrature"]

# The trapezoid rule on [-7, 7] integrates over the standard normal. For smooth integrands it converges as fast as
# Gauss-Hermite quadrature (its error is exp(-2 pi^2 / step^2)); for those with corners (ELU, CELU) it is better, since
# its nodes lie closer. And its nodes are made on the device without a copy.
_REACH = 7.0
_NODES = 65
# The square of a larger number overflows float32.
_FAR = 1e18
# Of an activation that is not negative a belief may reach below zero.
_ABOVE_ZERO = 1e-12
# Exponents are cut: infinity would end in the output.
_LARGEST_EXPONENT = 20.0


def _phi(z: Tensor) -> Tensor:
    """Density of the standard normal."""
    return torch.exp(-0.5 * z.square()) * (1 / math.sqrt(2 * math.pi))


def quadrature(x: Gaussian, function: Callable[[Tensor], Tensor], nodes: int = _NODES) -> Gaussian:
    """Mean and variance of ``function(x)``, element by element, by numerical integration.

    You need it to write a rule for a smooth function (:func:`kalmannorm.rule`). Fewer ``nodes`` cost less time: 33
    suffice for a sigmoid or tanh.

    Example:
        >>> import torch, kalmannorm as kn
        >>> x = kn.Gaussian(torch.zeros(1), torch.ones(1))
        >>> print(f"{kn.rules.pointwise.quadrature(x, torch.exp).mean.item():.4f}")  # exp(1 / 2)
        1.6487
    """
    z = torch.linspace(-_REACH, _REACH, nodes, device=x.mean.device, dtype=x.mean.dtype)
    weights = _phi(z) * (2 * _REACH / (nodes - 1))
    values = function(x.mean.unsqueeze(-1) + x.std.unsqueeze(-1) * z)
    mean = (values * weights).sum(-1)
    var = ((values - mean.unsqueeze(-1)).square() * weights).sum(-1)
    return Gaussian(mean, var)


def _smooth(x: Gaussian, function: Callable[[Tensor], Tensor], name: str) -> Gaussian:
    """:func:`quadrature` of an activation that is compiled for a CPU."""

    def plain(mean: Tensor, var: Tensor) -> Moments:
        y = quadrature(Gaussian(mean, var), function)
        return y.mean, y.var

    mean, var = torch.broadcast_tensors(x.mean, x.var)
    return Gaussian(*activation(mean, var, plain, compiled=(name,)))


def piecewise(x: Gaussian, breaks: Sequence[float], pieces: Sequence[Sequence[float]]) -> Gaussian:
    """A function that is a quadratic polynomial between breakpoints, in closed form.

    You need it to write a rule for a function with corners.

    Args:
        x: the belief.
        breaks: ``b_1 < ... < b_k``.
        pieces: ``k + 1`` polynomials ``(c_0, c_1, c_2)``, for ``c_0 + c_1 x + c_2 x^2``, each from one
            breakpoint to the next.

    Example:
        >>> import torch, kalmannorm as kn
        >>> x = kn.Gaussian(torch.zeros(1), torch.ones(1))
        >>> found = kn.rules.pointwise.piecewise(x, [0.0], [(0, 0, 0), (0, 1, 0)])  # a ReLU
        >>> print(f"{found.mean.item():.4f}")  # 1 / sqrt(2 pi)
        0.3989
    """
    compiled = ("pieces", breaks, pieces) if len(breaks) <= on_cpu.MOST_BREAKS else ()
    mean, var = torch.broadcast_tensors(x.mean, x.var)
    plain = partial(_of_pieces, breaks=breaks, pieces=pieces)
    sloped = partial(_of_pieces_with_slopes, breaks=breaks, pieces=pieces)
    return Gaussian(*activation(mean, var, plain, sloped, compiled))


def _of_pieces(mean: Tensor, var: Tensor, breaks: Sequence[float],
               pieces: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`piecewise` of moments of one shape, in functions that autograd can differentiate."""
    centre, first, second = _integrals(mean, Gaussian(mean, var).std, breaks, pieces, 0)
    return centre + first[0], (second[0] - first[0].square()).clamp_min(0)


def _integrals(m: Tensor, s: Tensor, breaks: Sequence[float], pieces: Sequence[Sequence[float]],
               most: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``f(m)``; and ``E[h z^j]`` and ``E[h^2 z^j]`` for ``j`` up to ``most``, with ``h = f(m + s z) - f(m)``.

    ``h`` has no large numbers that cancel. The first axis of the last two is that of ``j``.
    """
    end = torch.full_like(m, math.inf)
    edges = torch.stack([-end, *((b - m) / s for b in breaks), end])
    values = [_line(m, c0, c1) + c2 * m.square() if c2 else _line(m, c0, c1) for c0, c1, c2 in pieces]
    centre = values[0]
    for edge, above in zip(breaks, values[1:], strict=True):
        centre = torch.where(m > edge, above, centre)
    h = [torch.stack(values) - centre, torch.stack([_line(m, c1, 2 * c2) for _, c1, c2 in pieces]) * s]
    square = [h[0].square(), 2 * h[0] * h[1], h[1].square()]
    if any(c2 for *_, c2 in pieces):
        h.append(torch.stack([torch.full_like(m, c2) for *_, c2 in pieces]) * s.square())
        square[2] = square[2] + 2 * h[0] * h[2]
        square += [2 * h[1] * h[2], h[2].square()]
    powers = _powers_between(edges, len(square) + most)
    first, second = (
        (powers[: len(each) + most].unfold(0, len(each), 1) * torch.stack(each, -1)).sum((1, -1))
        for each in (h, square)
    )
    return centre, first, second


def _line(m: Tensor, c0: float, c1: float) -> Tensor:
    """``c0 + c1 m``, mostly of whole pieces that are constant or the identity."""
    if not c1:
        return torch.full_like(m, c0)
    line = m if c1 == 1 else c1 * m
    return line + c0 if c0 else line


def _powers_between(edges: Tensor, count: int) -> Tensor:
    """The integrals of ``z^k phi(z)`` from each edge to the next, for ``k`` from 0."""
    # Far in the tails the density is zero while the edge or its powers are infinite: their product is set to zero.
    near = edges.abs() < 40
    edge = torch.where(near, edges, 0.0)
    term = torch.where(near, _phi(edge), 0.0)
    # A difference of two upper or of two lower tail probabilities, whichever is the smaller.
    lower, upper = edges[:-1], edges[1:]
    flip = lower > 0
    above, below = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    found = [torch.special.ndtr(above) - torch.special.ndtr(below)]
    for k in range(1, count):
        between = term[:-1] - term[1:]
        found.append(torch.add(between, found[k - 2], alpha=k - 1) if k > 1 else between)
        term = term * edge
    return torch.stack(found)


def _of_pieces_with_slopes(mean: Tensor, var: Tensor, breaks: Sequence[float],
                           pieces: Sequence[Sequence[float]]) -> tuple[Moments, Slopes]:  # fmt: skip
    """The moments and, by Stein's lemma, their slopes.

    ``E g(m + s z)`` has the slopes ``E[g z] / s`` by ``m`` and ``E[g (z^2 - 1)] / (2 v)`` by ``v``.
    """
    s = Gaussian(mean, var).std
    centre, first, second = _integrals(mean, s, breaks, pieces, 2)
    by_mean, by_var = first[1] / s, (first[2] - first[0]) / (2 * s.square())
    square_by_mean, square_by_var = second[1] / s, (second[2] - second[0]) / (2 * s.square())
    twice = 2 * first[0]
    slopes = by_mean, by_var, square_by_mean - twice * by_mean, square_by_var - twice * by_var
    return (centre + first[0], (second[0] - first[0].square()).clamp_min(0)), slopes


# -- the ReLU family -------------------------------------------------------------------------------


@belief_rule("relu", "relu_")
def relu(x: Gaussian, inplace: bool = False) -> Gaussian:
    """``E = m Phi(a) + s phi(a)`` with ``a = m / s``; the variance in :mod:`kalmannorm.kernels.rectify`."""
    if is_transformed() and not torch.compiler.is_compiling():
        return Gaussian(*rectify(x.mean, x.var))
    return Rectified(x)


def _leaky(x: Gaussian, slope: float) -> Gaussian:
    """``x`` above zero and ``k x`` below, with a number for ``k``; see :mod:`kalmannorm.kernels.rectify`."""
    return Gaussian(*rectify(*torch.broadcast_tensors(x.mean, x.var), slope=float(slope)))


@belief_rule("prelu")
def prelu(x: Gaussian, weight: Tensor) -> Gaussian:
    """Leaky ReLU with a learned slope ``k``, one or one a channel: ``y = k x + (1 - k) relu(x)``.

    By Stein's lemma the covariance of the two terms is ``k (1 - k) v Phi(a)``.
    """
    slope = weight.to(x.mean.dtype)
    if slope.numel() > 1:
        x, slope = x.full([1]), slope.view(-1, *[1] * (x.ndim - 2))
    up = relu(x)
    above = torch.special.ndtr(x.mean / x.std)
    mean = slope * x.mean + (1 - slope) * up.mean
    var = slope**2 * x.var + (1 - slope) ** 2 * up.var + 2 * slope * (1 - slope) * x.var * above
    return Gaussian(mean, var.clamp_min(0))


@belief_rule("rrelu", "rrelu_")
def rrelu(x: Gaussian, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
          inplace: bool = False, generator: object = None) -> Gaussian:  # fmt: skip
    """Leaky ReLU whose slope is uniform on ``[lower, upper]`` in training, its mean otherwise."""
    y = _leaky(x, (lower + upper) / 2)
    if not training:
        return y
    down = relu(Gaussian(-x.mean, x.var))
    return Gaussian(y.mean, y.var + (upper - lower) ** 2 / 12 * (down.var + down.mean.square()))


# -- quadratic between breakpoints -----------------------------------------------------------------


@belief_rule("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_")
def clamp(x: Gaussian, min: Any = None, max: Any = None) -> Belief:
    """``clamp(x, min, max)`` with numbers for bounds, in closed form."""
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return Unknown("clamp between tensors")
    if min is not None and max is not None and min > max:
        min = max  # as torch does
    breaks: list[float] = []
    pieces = [(0.0, 1.0, 0.0)]
    if min is not None and min > -_FAR:
        breaks, pieces = [float(min)], [(float(min), 0.0, 0.0), *pieces]
    if max is not None and max < _FAR:
        breaks, pieces = [*breaks, float(max)], [*pieces, (float(max), 0.0, 0.0)]
    return piecewise(x, breaks, pieces) if breaks else x


belief_rules("in closed form", {
    "abs abs_": lambda x: piecewise(x, [0.0], [(0, -1, 0), (0, 1, 0)]),
    "clamp_max clamp_max_": lambda x, max: clamp(x, None, max),
    "hardshrink": lambda x, lambd=0.5: piecewise(x, [-lambd, lambd], [(0, 1, 0), (0, 0, 0), (0, 1, 0)]),
    "hardsigmoid": lambda x, inplace=False: piecewise(x, [-3.0, 3.0], [(0, 0, 0), (1 / 2, 1 / 6, 0), (1, 0, 0)]),
    "hardswish": lambda x, inplace=False: piecewise(x, [-3.0, 3.0], [(0, 0, 0), (0, 1 / 2, 1 / 6), (0, 1, 0)]),
    "hardtanh hardtanh_": lambda x, min_val=-1.0, max_val=1.0, inplace=False: clamp(x, min_val, max_val),
    "leaky_relu leaky_relu_": lambda x, negative_slope=0.01, inplace=False: _leaky(x, negative_slope),
    "relu6": lambda x, inplace=False: clamp(x, 0.0, 6.0),
    "sign sign_ sgn sgn_": lambda x: piecewise(x, [0.0], [(-1, 0, 0), (1, 0, 0)]),
    "softshrink": lambda x, lambd=0.5: piecewise(x, [-lambd, lambd], [(lambd, 1, 0), (0, 0, 0), (-lambd, 1, 0)]),
    "threshold threshold_": lambda x, threshold, value, inplace=False: piecewise(
        x, [threshold], [(value, 0, 0), (0, 1, 0)]
    ),
})  # fmt: skip


# -- smooth functions ------------------------------------------------------------------------------


@belief_rule("exp", "exp_")
def exp(x: Gaussian) -> Gaussian:
    """A log-normal, of mean ``e^(m + v / 2)`` and variance ``(e^v - 1) e^(2 m + v)``."""
    mean = torch.exp((x.mean + x.var / 2).clamp_max(_LARGEST_EXPONENT))
    return Gaussian(mean, torch.expm1(x.var.clamp_max(_LARGEST_EXPONENT)) * mean.square())


@belief_rule("expm1", "expm1_")
def expm1(x: Gaussian) -> Gaussian:
    """The log-normal less one."""
    grown = exp(x)
    return Gaussian(grown.mean - 1, grown.var)


def _wave(x: Gaussian, wave: Callable[[Tensor], Tensor], sign: float) -> Gaussian:
    """``e^(-v / 2) wave(m)`` and ``(1 - e^-v) (1 + sign e^-v cos 2 m) / 2``: at any width, where nodes miss waves."""
    kept, lost = torch.exp(-x.var), -torch.expm1(-x.var)
    return Gaussian(torch.exp(-0.5 * x.var) * wave(x.mean), 0.5 * lost * (1 + sign * kept * torch.cos(2 * x.mean)))


belief_rules("in closed form", {
    "sin sin_": lambda x: _wave(x, torch.sin, 1.0),
    "cos cos_": lambda x: _wave(x, torch.cos, -1.0),
})


def _raised(base: Any, exponent: Any) -> Any:
    """A power; by a fraction, of what is not negative; of a number, by what is not too large."""
    if not isinstance(base, Tensor):
        return base ** exponent.clamp_max(_LARGEST_EXPONENT)
    if isinstance(exponent, Tensor):
        cut = base.clamp_min(_ABOVE_ZERO)
        return (cut if exponent.requires_grad else torch.where(exponent == exponent.round(), base, cut)) ** exponent
    whole = float(exponent).is_integer()
    if exponent < 0:
        return _denominator(base if whole else base.clamp_min(0)) ** exponent
    return (base if whole else base.clamp_min(_ABOVE_ZERO)) ** exponent


def _denominator(t: Tensor) -> Tensor:
    """Values at nodes, kept from zero if they reach it."""
    reach = (t.amin(-1, keepdim=True) <= 0) & (t.amax(-1, keepdim=True) >= 0)
    least = t.square().mean(-1, keepdim=True).clamp_min(torch.finfo(t.dtype).tiny).sqrt() / 10
    return _away_from_zero(t, torch.where(reach, least, 0.0))


def _positive(t: Tensor) -> Tensor:
    """Values at nodes, of which a logarithm is taken: one that is zero counts as the mean logarithm up to the next."""
    apart = t.detach().diff(dim=-1).abs()
    between = (F.pad(apart, (1, 0)) + F.pad(apart, (0, 1))) / 2
    return torch.maximum(t, (between / (2 * math.e)).clamp_min(_ABOVE_ZERO))


def _quotient(x: Any, y: Any, **options: Any) -> Tensor:
    """``x / y`` of numbers and tensors, of which one is of nodes."""
    return torch.div(x, _denominator(y) if isinstance(y, Tensor) and y.ndim > 1 else y, **options)


def inverse(x: Gaussian, power: float = -1.0) -> Gaussian:
    """``1 / x``, or another negative power, of an ``x`` that is kept from zero, where it has no moments.

    Nearer to zero than a third of its root mean square it counts as that.
    """
    least = (x.mean.square() + x.var).clamp_min(torch.finfo(x.mean.dtype).tiny).sqrt().unsqueeze(-1) / 3
    return quadrature(x, lambda t: _away_from_zero(t if power.is_integer() else t.clamp_min(0), least) ** power)


def _away_from_zero(t: Tensor, least: Tensor | float) -> Tensor:
    return torch.where(t.abs() < least, torch.where(t < 0, -least, least), t)


def log(x: Gaussian, base: float = math.e) -> Gaussian:
    """As if of a log-normal: the inverse of the rule for ``exp``."""
    mean = torch.maximum(x.mean, x.std / 10)  # a belief about what is positive may still reach below zero
    var = torch.log1p(x.var / mean.square())
    unit = 1 / math.log(base)
    return Gaussian((mean.log() - var / 2) * unit, var * unit**2)


belief_rules("of a log-normal", {
    "log log_": log,
    "log1p log1p_": lambda x: log(Gaussian(x.mean + 1, x.var)),
    "log2 log2_": lambda x: log(x, 2.0),
    "log10 log10_": lambda x: log(x, 10.0),
})  # fmt: skip


belief_rules("see `inverse`", {
    "reciprocal reciprocal_": inverse,
    "rsqrt rsqrt_": lambda x: inverse(x, -0.5),
})


@belief_rule("pow", "pow_", "__pow__", "float_power")
def power(x: Gaussian, exponent: Any) -> Belief:
    """A power, by quadrature. By a fraction it is of what is not negative.

    Whether a number in a tensor (GeM pooling's) is whole or negative is not asked, which would make a device wait. By a
    negative one the belief is cut at a tenth of its mean, so that it stays finite.
    """
    if isinstance(exponent, Real):
        return inverse(x, float(exponent)) if exponent < 0 else quadrature(x, lambda t: _raised(t, exponent))
    if not isinstance(exponent, Tensor) or exponent.numel() > 1:
        return Unknown("power with several exponents")
    n = exponent.reshape(()).to(x.mean.dtype)
    least = torch.where(n < 0, x.mean.abs() / 10, _ABOVE_ZERO).clamp_min(_ABOVE_ZERO).unsqueeze(-1)
    if n.requires_grad:  # a learned one needs what is positive
        return quadrature(x, lambda t: torch.maximum(t, least) ** n)
    whole = (n == n.round()) & (n >= 0)
    return quadrature(x, lambda t: torch.where(whole, t, torch.maximum(t, least)) ** n)


def _gelu(x: Gaussian, approximate: str = "none") -> Gaussian:
    if approximate == "none":
        return _smooth(x, F.gelu, "gelu")
    return quadrature(x, partial(F.gelu, approximate=approximate))


belief_rules("by quadrature", {
    # Steps of a rounding are mostly smaller than a deviation.
    "ceil ceil_": lambda x: quadrature(x, torch.ceil),
    "floor floor_": lambda x: quadrature(x, torch.floor),
    "round round_": lambda x, *, decimals=0: quadrature(x, lambda t: torch.round(t, decimals=decimals)),
    "trunc trunc_ fix fix_": lambda x: quadrature(x, torch.trunc),
    "asinh asinh_": lambda x: quadrature(x, torch.asinh),
    "atan atan_": lambda x: quadrature(x, torch.atan),
    "celu celu_": lambda x, alpha=1.0, inplace=False: quadrature(x, lambda t: F.celu(t, alpha)),
    "elu elu_": lambda x, alpha=1.0, inplace=False: quadrature(x, lambda t: F.elu(t, alpha)),
    "erf erf_": lambda x: quadrature(x, torch.erf),
    "gelu": _gelu,
    "logsigmoid": lambda x: quadrature(x, F.logsigmoid),
    "mish": lambda x, inplace=False: quadrature(x, F.mish),
    "selu selu_": lambda x, inplace=False: quadrature(x, F.selu),
    "sigmoid sigmoid_": lambda x: _smooth(x, torch.sigmoid, "sigmoid"),
    "silu": lambda x, inplace=False: _smooth(x, F.silu, "silu"),
    "softplus": lambda x, beta=1.0, threshold=20.0: quadrature(x, lambda t: F.softplus(t, beta, threshold)),
    "softsign": lambda x: quadrature(x, F.softsign),
    "sqrt sqrt_": lambda x: quadrature(x, lambda t: t.clamp_min(_ABOVE_ZERO).sqrt()),
    "square square_": lambda x: quadrature(x, torch.square),
    "tanh tanh_": lambda x: quadrature(x, torch.tanh),
    "tanhshrink": lambda x: quadrature(x, F.tanhshrink),
})  # fmt: skip


# Changes of type: a belief keeps its own precision.
CASTS = ("float", "double", "half", "bfloat16")
CASTS_TO = ("to", "type_as")  # a type that is given
# What to call for functions whose values or slopes may be infinite, or that take a tensor of channels.
_GUARDED: dict[str, Callable[..., Any]] = {
    " ".join((*CASTS, *CASTS_TO)): (
        lambda t, *args, **kwargs: t if t.is_floating_point() else t.to(torch.get_default_dtype())
    ),
    "div div_ divide divide_ true_divide __truediv__ __itruediv__": _quotient,
    "addcdiv addcdiv_": lambda t, first, second, *, value=1: t + value * _quotient(first, second),
    "exp exp_": lambda t: t.clamp_max(_LARGEST_EXPONENT).exp(),
    "log log_": lambda t: _positive(t).log(),
    "log1p log1p_": lambda t: _positive(1 + t).log(),
    "log2 log2_": lambda t: _positive(t).log2(),
    "log10 log10_": lambda t: _positive(t).log10(),
    "expm1 expm1_": lambda t: t.clamp_max(_LARGEST_EXPONENT).expm1(),
    "pow pow_ __pow__ float_power": _raised,
    "prelu": lambda t, weight: torch.where(t > 0, t, weight * t),
    "reciprocal reciprocal_": lambda t: _quotient(1.0, t),
    "rsqrt rsqrt_": lambda t: _denominator(t.clamp_min(0)).rsqrt(),
    "sqrt sqrt_": lambda t: t.clamp_min(_ABOVE_ZERO).sqrt(),
    "__rtruediv__": lambda t, other: _quotient(other, t),
}
GUARDED = {function: by for names, by in _GUARDED.items() for function in aliases(*names.split())}
