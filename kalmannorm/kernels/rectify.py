"""ReLU of a Gaussian, leaky or not: its moments and their slopes in closed form.

With ``a = m / s``, ``g = a Phi(a) + phi(a)`` and ``h = phi(a) - a Phi(-a)`` (the expected positive and
negative parts in units of ``s``), ``E = s g`` and ``var = v (Phi(a) - g h)``, without the cancellation of
``E[y^2] - E[y]^2``. A derivative by the variance is half a second derivative by the mean:

    d E = Phi dm + phi / (2 s) dv,    d var = 2 E Phi(-a) dm + (Phi(a) - g phi) dv.

With a slope ``k`` below zero, ``y = k x + (1 - k) relu(x)``, and by Stein's lemma the covariance of ``x`` and
``relu(x)`` is ``v Phi(a)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor]
Slopes = Sequence[Tensor]
"""Of the mean by the mean and by the variance, then of the variance by both."""


class _Terms(NamedTuple):
    """What the moments and their slopes are made of."""

    std: Tensor
    a: Tensor
    above: Tensor  # Phi(a)
    below: Tensor  # Phi(-a)
    density: Tensor  # phi(a)
    positive: Tensor  # g


def _terms(mean: Tensor, var: Tensor) -> _Terms:
    std = var.clamp_min(torch.finfo(var.dtype).tiny ** 0.5).sqrt()
    a = (mean / std).clamp(-1e3, 1e3)
    density = torch.exp(a.square() * -0.5) * (1 / math.sqrt(2 * math.pi))
    far = a * math.sqrt(0.5)
    above, below = torch.erfc(-far) * 0.5, torch.erfc(far) * 0.5
    return _Terms(std, a, above, below, density, torch.addcmul(density, a, above))


def _moments(mean: Tensor, var: Tensor, terms: _Terms, slope: float) -> Moments:
    std, a, above, below, density, positive = terms
    negative = torch.addcmul(density, a, below, value=-1)
    # Where the input is surely positive, the mean itself carries no rounding of the quotient.
    after = torch.where(a > 30, mean, std * positive)
    share = torch.addcmul(above, positive, negative, value=-1).clamp_min(0)
    if slope:
        rest = 1 - slope
        after, share = torch.lerp(after, mean, slope), rest**2 * share + 2 * slope * rest * above + slope**2
    return after, var * share


def _slopes(terms: _Terms, slope: float) -> Slopes:
    std, a, above, below, density, positive = terms
    mean_by_mean, mean_by_var = above, density / (2 * std)
    var_by_mean, var_by_var = 2 * std * positive * below, torch.addcmul(above, positive, density, value=-1)
    if slope:
        rest, both = 1 - slope, 2 * slope * (1 - slope)
        mean_by_mean, mean_by_var = rest * mean_by_mean + slope, rest * mean_by_var
        var_by_mean = rest**2 * var_by_mean + both * std * density
        var_by_var = rest**2 * var_by_var + both * (above - a * density / 2) + slope**2
    return mean_by_mean, mean_by_var, var_by_mean, var_by_var


def rectified(mean: Tensor, var: Tensor, *, slope: float = 0.0) -> Moments:
    """Mean and variance of ``max(x, 0)``, or of ``slope x`` below zero, in functions that torch can differentiate."""
    return _moments(mean, var, _terms(mean, var), slope)


def rectified_with_slopes(mean: Tensor, var: Tensor, *, slope: float = 0.0) -> tuple[Moments, Slopes]:
    """As :func:`rectified`, and the slopes."""
    terms = _terms(mean, var)
    return _moments(mean, var, terms, slope), _slopes(terms, slope)


def rectified_gradients(mean: Tensor, var: Tensor, d_mean: Tensor, d_var: Tensor) -> Moments:
    """The gradients of ``mean`` and ``var``, from those of the moments behind a ReLU."""
    return through(_slopes(_terms(mean, var), 0.0), d_mean, d_var)


def through(slopes: Slopes, d_mean: Tensor, d_var: Tensor) -> Moments:
    """The gradients of the mean and the variance before an activation, from those behind it."""
    mean_by_mean, mean_by_var, var_by_mean, var_by_var = slopes
    by_mean = torch.addcmul(d_mean * mean_by_mean, d_var, var_by_mean)
    return by_mean, torch.addcmul(d_mean * mean_by_var, d_var, var_by_var)
