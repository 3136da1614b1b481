"""Activations: the ReLU family in closed form, smooth functions by quadrature.

Each output element depends on one input element, so nothing is assumed here but that it is Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Packed, Unknown
from kalmannorm.kernels.autograd import in_grad_mode, is_transformed, saved_tensor_hooks
from kalmannorm.kernels.rectify import rectify
from kalmannorm.rules.table import DEFERRING, Belief, aliases, rule

__all__ = ["Deferred", "Rectified", "piecewise", "quadrature"]

# The standard normal is integrated by the trapezoid rule on [-8, 8]. For smooth integrands it
# converges as fast as Gauss-Hermite quadrature (its error is exp(-2 pi^2 / step^2)), for kinked ones
# (ELU, CELU) faster, as its nodes lie closer, and the nodes are made on the device without a copy.
_REACH = 8.0
_NODES = 129
# Beyond it the square of a number of float32 overflows.
_FAR = 1e18


def _phi(z: Tensor) -> Tensor:
    """Density of the standard normal."""
    return torch.exp(-0.5 * z.square()) * (1 / math.sqrt(2 * math.pi))


def quadrature(x: Gaussian, function: Callable[[Tensor], Tensor]) -> Gaussian:
    """Mean and variance of ``function(x)``, element by element, by numerical integration.

    You need it to write a rule for a smooth function (:func:`kalmannorm.rule`).

    Example:
        >>> import torch, kalmannorm as kn
        >>> x = kn.Gaussian(torch.zeros(1), torch.ones(1))
        >>> print(f"{kn.rules.pointwise.quadrature(x, torch.exp).mean.item():.4f}")  # exp(1 / 2)
        1.6487
    """
    z = torch.linspace(-_REACH, _REACH, _NODES, device=x.mean.device, dtype=x.mean.dtype)
    weights = _phi(z) * (2 * _REACH / (_NODES - 1))
    values = function(x.mean.unsqueeze(-1) + x.std.unsqueeze(-1) * z)
    mean = (values * weights).sum(-1)
    var = ((values - mean.unsqueeze(-1)).square() * weights).sum(-1)
    return Gaussian(mean, var)


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
    m, s = x.mean, x.std
    edges = [torch.full_like(m, -math.inf), *((b - m) / s for b in breaks), torch.full_like(m, math.inf)]
    # Every moment is taken about one value of the function, which leaves nothing large to cancel.
    # Far in the tails the density is zero, while the edge or its powers are infinite: their product,
    # z^k * phi(z), is then zero.
    centre = _polynomial_at(m, breaks, pieces)
    near = [e.abs() < 40 for e in edges]
    finite = [torch.where(n, e, 0.0) for n, e in zip(near, edges, strict=True)]
    density = [torch.where(n, _phi(f), 0.0) for n, f in zip(near, finite, strict=True)]
    first = torch.zeros_like(m)
    second = torch.zeros_like(m)
    for i, (c0, c1, c2) in enumerate(pieces):
        # A difference of two upper or of two lower tail probabilities, whichever is the smaller.
        lower, upper = edges[i], edges[i + 1]
        flip = lower > 0
        p = torch.special.ndtr(torch.where(flip, -lower, upper))
        p = p - torch.special.ndtr(torch.where(flip, -upper, lower))
        moments = [p, density[i] - density[i + 1]]
        for k in (2, 3, 4):
            edge = finite[i] ** (k - 1) * density[i] - finite[i + 1] ** (k - 1) * density[i + 1]
            moments.append((k - 1) * moments[k - 2] + edge)
        a = c0 + c1 * m + c2 * m.square() - centre
        b = (c1 + 2 * c2 * m) * s
        c = c2 * s.square()
        first = first + a * moments[0] + b * moments[1] + c * moments[2]
        second = second + (
            a.square() * moments[0]
            + 2 * a * b * moments[1]
            + (b.square() + 2 * a * c) * moments[2]
            + 2 * b * c * moments[3]
            + c.square() * moments[4]
        )
    return Gaussian(centre + first, (second - first.square()).clamp_min(0))


def _polynomial_at(m: Tensor, breaks: Sequence[float], pieces: Sequence[Sequence[float]]) -> Tensor:
    value = torch.zeros_like(m)
    for i, (c0, c1, c2) in enumerate(pieces):
        inside = torch.ones_like(m, dtype=torch.bool)
        if i > 0:
            inside = inside & (m > breaks[i - 1])
        if i < len(breaks):
            inside = inside & (m <= breaks[i])
        value = torch.where(inside, c0 + c1 * m + c2 * m.square(), value)
    return value


class Deferred(Gaussian):
    """A belief whose moments are computed when they are asked for, or by who does that along with something else
    (:meth:`keep`).

    Args:
        below: the belief that it follows from.
    """

    __slots__ = ("_grad", "_known", "_where", "below")

    def __init__(self, below: Gaussian) -> None:
        self.below = below
        self.shape = below.shape
        self._known: Gaussian | None = None
        self._where: object = None
        self._grad = torch.is_grad_enabled()  # of who made it, who need not be who asks first

    def _compute(self) -> Gaussian:
        raise NotImplementedError

    def _of(self, below: Gaussian) -> Deferred:
        """The same of another belief."""
        return type(self)(below)

    @property
    def is_known(self) -> bool:
        """Whether the moments were computed, in the same checkpointed region, if any."""
        return self._known is not None and self._where == saved_tensor_hooks()

    def keep(self, known: Gaussian) -> None:
        """Take the moments from who has computed them, unless without the gradients that others need."""
        if torch.is_grad_enabled() or not self._grad:
            self._known, self._where = known, saved_tensor_hooks()

    def forget(self) -> None:
        """Compute the moments again when they are asked for."""
        self._known = None

    def evaluate(self) -> Gaussian:
        """The same belief, its moments computed now if they are not known."""
        if not self.is_known:
            with in_grad_mode(self._grad):
                self.keep(self._compute())
        assert self._known is not None
        return self._known

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """As :class:`Gaussian`'s."""
        return self.evaluate().mean

    @property
    def var(self) -> Tensor:  # type: ignore[override]
        """As :class:`Gaussian`'s."""
        return self.evaluate().var

    @property
    def ndim(self) -> int:
        """As :class:`Gaussian`'s."""
        return self.below.ndim

    @property
    def groups(self) -> int:
        """As :class:`Gaussian`'s."""
        return self.below.groups

    def is_per_channel(self, channels: int) -> bool:
        """As :class:`Gaussian`'s; nothing is computed."""
        return self.below.is_per_channel(channels)

    def of(self, shape: Sequence[int]) -> Gaussian:
        """As :class:`Gaussian`'s; nothing is computed."""
        self.shape = tuple(shape)
        return self

    def detach(self) -> Gaussian:
        """As :class:`Gaussian`'s; nothing is computed."""
        new = self._of(self.below.detach())
        new._grad = False
        return new.of(self.shape)

    def packed(self) -> Packed:
        """As :class:`Gaussian`'s."""
        return self.evaluate().packed()


class Rectified(Deferred):
    """A rectified Gaussian. Behind a ReLU there mostly is a convolution, which computes this along with its own."""

    __slots__ = ()

    def _compute(self) -> Gaussian:
        return Gaussian(*rectify(self.below.mean, self.below.var))


@rule(*aliases("relu", "relu_"))
def relu(x: Gaussian, inplace: bool = False) -> Gaussian:
    """``E = m Phi(a) + s phi(a)`` with ``a = m / s``; the variance in :mod:`kalmannorm.kernels.rectify`."""
    if is_transformed() and not torch.compiler.is_compiling():
        return Gaussian(*rectify(x.mean, x.var))
    return Rectified(x)


DEFERRING[relu] = lambda x, inplace=False: True


def _two_slopes(x: Gaussian, slope: Tensor | float, slope_var: float = 0.0) -> Gaussian:
    """``k x`` below zero, ``x`` above: ``y = k x + (1 - k) relu(x)``, and Stein's lemma for the
    covariance of its two terms, ``v Phi(a)``. ``k`` itself may be random, with ``slope_var``.
    """
    up = relu(x)
    above = torch.special.ndtr(x.mean / x.std)
    mean = slope * x.mean + (1 - slope) * up.mean
    var = slope**2 * x.var + (1 - slope) ** 2 * up.var + 2 * slope * (1 - slope) * x.var * above
    if slope_var:
        down = relu(Gaussian(-x.mean, x.var))
        var = var + slope_var * (down.var + down.mean.square())
    return Gaussian(mean, var.clamp_min(0))


@rule(*aliases("leaky_relu", "leaky_relu_"))
def leaky_relu(x: Gaussian, negative_slope: float = 0.01, inplace: bool = False) -> Gaussian:
    """``y = k x + (1 - k) relu(x)``, in closed form."""
    return _two_slopes(x, negative_slope)


@rule(*aliases("prelu"))
def prelu(x: Gaussian, weight: Tensor) -> Belief:
    """Leaky ReLU with a learned slope, one or one a channel."""
    if isinstance(weight, Gaussian):
        return Unknown("the slope is computed from the input")
    slope = weight.to(x.mean.dtype)
    if x.ndim > 1 and slope.numel() > 1:
        x, slope = x.full([1]), slope.view(-1, *[1] * (x.ndim - 2))
    return _two_slopes(x, slope)


@rule(*aliases("rrelu", "rrelu_"))
def rrelu(x: Gaussian, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
          inplace: bool = False, generator: object = None) -> Gaussian:  # fmt: skip
    """Leaky ReLU whose slope is uniform on ``[lower, upper]`` in training, its mean otherwise."""
    return _two_slopes(x, (lower + upper) / 2, (upper - lower) ** 2 / 12 if training else 0.0)


@rule(*aliases("hardtanh", "hardtanh_"))
def hardtanh(x: Gaussian, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Gaussian:
    """``clamp(x, min_val, max_val)``, in closed form; ReLU6 arrives as this."""
    return _between(x, min_val, max_val)


def _between(x: Gaussian, low: float, high: float) -> Gaussian:
    """``clamp(x, low, high)``. A bound so far away that its square would overflow is none."""
    breaks, pieces = [], [(0.0, 1.0, 0.0)]
    if low > -_FAR:
        breaks, pieces = [low], [(low, 0.0, 0.0), *pieces]
    if high < _FAR:
        breaks, pieces = [*breaks, high], [*pieces, (high, 0.0, 0.0)]
    return piecewise(x, breaks, pieces) if breaks else x


@rule(*aliases("relu6"))
def relu6(x: Gaussian, inplace: bool = False) -> Gaussian:
    """``clamp(x, 0, 6)``, in closed form."""
    return hardtanh(x, 0.0, 6.0)


@rule(*aliases("clamp", "clamp_", "clip", "clip_"))
def clamp(x: Gaussian, min: object = None, max: object = None) -> Belief:
    """``clamp(x, min, max)`` with numbers for bounds, in closed form."""
    if isinstance(min, Tensor | Gaussian) or isinstance(max, Tensor | Gaussian):
        return Unknown("clamp between tensors")
    low: Any = -math.inf if min is None else min
    high: Any = math.inf if max is None else max
    return _between(x, float(low), float(high))


@rule(*aliases("clamp_min", "clamp_min_"))
def clamp_min(x: Gaussian, min: object) -> Belief:
    """``max(x, min)`` with a number, in closed form."""
    return clamp(x, min, None)


@rule(*aliases("clamp_max", "clamp_max_"))
def clamp_max(x: Gaussian, max: object) -> Belief:
    """``min(x, max)`` with a number, in closed form."""
    return clamp(x, None, max)


@rule(*aliases("hardsigmoid"))
def hardsigmoid(x: Gaussian, inplace: bool = False) -> Gaussian:
    """``clamp(x / 6 + 1 / 2, 0, 1)``, in closed form."""
    return piecewise(x, [-3.0, 3.0], [(0, 0, 0), (1 / 2, 1 / 6, 0), (1, 0, 0)])


@rule(*aliases("hardswish"))
def hardswish(x: Gaussian, inplace: bool = False) -> Gaussian:
    """``x clamp(x / 6 + 1 / 2, 0, 1)``, in closed form."""
    return piecewise(x, [-3.0, 3.0], [(0, 0, 0), (0, 1 / 2, 1 / 6), (0, 1, 0)])


@rule(*aliases("hardshrink"))
def hardshrink(x: Gaussian, lambd: float = 0.5) -> Gaussian:
    """``x`` outside ``[-lambd, lambd]``, zero inside, in closed form."""
    return piecewise(x, [-lambd, lambd], [(0, 1, 0), (0, 0, 0), (0, 1, 0)])


@rule(*aliases("softshrink"))
def softshrink(x: Gaussian, lambd: float = 0.5) -> Gaussian:
    """``x`` moved towards zero by ``lambd``, in closed form."""
    return piecewise(x, [-lambd, lambd], [(lambd, 1, 0), (0, 0, 0), (-lambd, 1, 0)])


@rule(*aliases("threshold", "threshold_"))
def threshold(x: Gaussian, threshold: float, value: float, inplace: bool = False) -> Gaussian:
    """``x`` above the threshold, ``value`` below, in closed form."""
    return piecewise(x, [threshold], [(value, 0, 0), (0, 1, 0)])


@rule(*aliases("abs", "abs_"))
def absolute(x: Gaussian) -> Gaussian:
    """``|x|``, in closed form."""
    return piecewise(x, [0.0], [(0, -1, 0), (0, 1, 0)])


@rule(*aliases("exp", "exp_"))
def exp(x: Gaussian) -> Gaussian:
    """A log-normal, of mean ``e^(m + v / 2)`` and variance ``(e^v - 1) e^(2 m + v)``."""
    # A belief may be too wide, and infinity would end in the output: so no exponent is larger than 20.
    mean = torch.exp((x.mean + x.var / 2).clamp_max(20))
    return Gaussian(mean, torch.expm1(x.var.clamp_max(20)) * mean.square())


@rule(*aliases("expm1", "expm1_"))
def expm1(x: Gaussian) -> Gaussian:
    """The log-normal less one."""
    grown = exp(x)
    return Gaussian(grown.mean - 1, grown.var)


@rule(*aliases("gelu"))
def gelu(x: Gaussian, approximate: str = "none") -> Gaussian:
    """By quadrature."""
    return quadrature(x, lambda t: F.gelu(t, approximate=approximate))


@rule(*aliases("elu", "elu_"))
def elu(x: Gaussian, alpha: float = 1.0, inplace: bool = False) -> Gaussian:
    """By quadrature."""
    return quadrature(x, lambda t: F.elu(t, alpha))


@rule(*aliases("celu", "celu_"))
def celu(x: Gaussian, alpha: float = 1.0, inplace: bool = False) -> Gaussian:
    """By quadrature."""
    return quadrature(x, lambda t: F.celu(t, alpha))


@rule(*aliases("softplus"))
def softplus(x: Gaussian, beta: float = 1.0, threshold: float = 20.0) -> Gaussian:
    """By quadrature."""
    return quadrature(x, lambda t: F.softplus(t, beta, threshold))


@rule(*aliases("pow", "pow_", "__pow__", "float_power"))
def power(x: Gaussian, exponent: object) -> Belief:
    """A whole, non-negative power, by quadrature; others are not defined for negative inputs."""
    if not isinstance(exponent, int | float) or exponent < 0 or exponent != int(exponent):
        return Unknown(f"power {exponent}")
    whole = int(exponent)
    return quadrature(x, lambda t: t**whole)


@rule(*aliases("sqrt", "sqrt_"))
def sqrt(x: Gaussian) -> Gaussian:
    """By quadrature, of zero where the belief reaches below: the activation does not."""
    return quadrature(x, lambda t: t.clamp_min(1e-12).sqrt())


def _by_quadrature(function: Any) -> Callable[..., Gaussian]:
    def smooth(x: Gaussian, inplace: bool = False) -> Gaussian:
        return quadrature(x, function)

    smooth.__name__ = function.__name__
    smooth.__doc__ = f"``{function.__name__}`` by quadrature."
    return smooth


for _name, _function in {
    "silu": F.silu, "mish": F.mish, "selu": F.selu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "logsigmoid": F.logsigmoid, "softsign": F.softsign, "tanhshrink": F.tanhshrink,
    "square": torch.square, "sin": torch.sin, "cos": torch.cos, "erf": torch.erf,
    "atan": torch.atan, "asinh": torch.asinh,
}.items():  # fmt: skip
    rule(*aliases(_name, _name + "_"))(_by_quadrature(_function))
