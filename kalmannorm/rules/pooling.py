"""Pooling: averages and maxima of independent elements with one common belief.

Neighbouring pixels are taken as independent, which real feature maps are not: an average over a
window is believed to vary less, a maximum to lie higher, than they do. Border padding is ignored.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence

from kalmannorm.gaussian import Gaussian
from kalmannorm.kernels.autograd import constant_to_compilers
from kalmannorm.rules.shape import per_axis
from kalmannorm.rules.table import belief_rule

__all__ = ["extreme_moments", "largest_of"]

_Size = int | None | Sequence[int | None]


def _average(x: Gaussian, count: float) -> Gaussian:
    """The mean of ``count`` independent elements: ``m`` and ``v / count``."""
    x = x.pool(range(2, x.ndim))
    return Gaussian(x.mean, x.var / count)


@constant_to_compilers
def extreme_moments(count: int) -> tuple[float, float]:
    """Mean and variance of the largest of ``count`` independent standard normals."""
    return _extreme_moments(count)


@functools.cache
def _extreme_moments(count: int) -> tuple[float, float]:
    """Integrates the density, ``count * phi(z) * Phi(z)^(count - 1)``, by the trapezoid rule."""
    step = 1 / 256
    total = first = second = 0.0
    for i in range(-10 * 256, 10 * 256 + 1):
        z = i * step
        density = math.exp(-0.5 * z * z) * (0.5 * math.erfc(-z / math.sqrt(2))) ** (count - 1)
        total += density
        first += density * z
        second += density * z * z
    mean = first / total
    return mean, second / total - mean * mean


def _maximum(x: Gaussian, windows: Counter[int]) -> Gaussian:
    """The largest of ``k`` independent elements: ``m + s M_k`` and ``v V_k``.

    ``M_k`` and ``V_k`` are the moments of the largest of ``k`` standard normals, or of a mixture if there
    are windows of several ``k``.
    """
    total = windows.total()
    moments = [(n / total, *extreme_moments(k)) for k, n in windows.items()]
    shift = sum(share * mean for share, mean, _ in moments)
    scale = sum(share * (var + (mean - shift) ** 2) for share, mean, var in moments)
    return Gaussian(x.mean + shift * x.std, x.var * scale)


def largest_of(x: Gaussian, count: int) -> Gaussian:
    """The largest of ``count`` independent elements."""
    return _maximum(x, Counter({count: 1}))


def _adaptive_lengths(x: Gaussian, output_size: _Size, spatial: int) -> list[list[int]]:
    """Window lengths of adaptive pooling along each spatial axis, one for each output position."""
    lengths = []
    for size, out in zip(x.shape[-spatial:], per_axis(output_size, spatial), strict=True):
        out = size if out is None else out
        lengths.append([-(-(i + 1) * size // out) - i * size // out for i in range(out)])
    return lengths


def _define(spatial: int) -> None:
    """The pooling functions of one dimensionality."""

    @belief_rule(f"avg_pool{spatial}d")
    def avg_pool(x: Gaussian, kernel_size: int | Sequence[int], stride: object = None, padding: object = 0,
                 ceil_mode: bool = False, count_include_pad: bool = True,
                 divisor_override: int | None = None) -> Gaussian:  # fmt: skip
        """``m`` and ``v / k`` for a window of ``k`` elements."""
        count = math.prod(per_axis(kernel_size, spatial))
        pooled = _average(x, count)
        if divisor_override is None:
            return pooled
        factor = count / divisor_override
        return Gaussian(pooled.mean * factor, pooled.var * factor**2)

    @belief_rule(f"max_pool{spatial}d", f"max_pool{spatial}d_with_indices")
    def max_pool(x: Gaussian, kernel_size: int | Sequence[int], *args: object, **kwargs: object) -> Gaussian:
        """``m + s M_k`` and ``v V_k`` for a window of ``k`` elements."""
        return largest_of(x.pool(range(2, x.ndim)), math.prod(per_axis(kernel_size, spatial)))

    @belief_rule(f"adaptive_avg_pool{spatial}d")
    def adaptive_avg_pool(x: Gaussian, output_size: _Size) -> Gaussian:
        """``m``, and ``v`` times the mean of ``1 / k`` over windows of ``k`` elements."""
        lengths = _adaptive_lengths(x, output_size, spatial)
        return _average(x, 1 / math.prod([sum(1 / k for k in axis) / len(axis) for axis in lengths]))

    @belief_rule(f"adaptive_max_pool{spatial}d", f"adaptive_max_pool{spatial}d_with_indices")
    def adaptive_max_pool(x: Gaussian, output_size: _Size, return_indices: bool = False) -> Gaussian:
        """``m + s M_k`` and ``v V_k``, the mixture over windows of ``k`` elements."""
        lengths = _adaptive_lengths(x, output_size, spatial)
        windows: Counter[int] = Counter()
        for window in itertools.product(*(Counter(axis).items() for axis in lengths)):
            windows[math.prod([k for k, _ in window])] += math.prod([n for _, n in window])
        return _maximum(x.pool(range(2, x.ndim)), windows)

    @belief_rule(f"max_unpool{spatial}d")
    def max_unpool(x: Gaussian, indices: object, kernel_size: int | Sequence[int],
                   stride: int | Sequence[int] | None = None, padding: int | Sequence[int] = 0,
                   output_size: Sequence[int] | None = None) -> Gaussian:  # fmt: skip
        """One of ``k`` elements of the output is the input's, the others are zero: ``m / k``."""
        inputs = x.shape[-spatial:]
        if output_size is None:
            each = (per_axis(given, spatial) for given in (kernel_size, stride or kernel_size, padding))
            sizes = [(n - 1) * step + size - 2 * pad for n, size, step, pad in zip(inputs, *each, strict=True)]
        else:
            sizes = list(output_size)[-spatial:]
        share = math.prod(inputs) / math.prod(sizes)
        x = x.pool(range(2, x.ndim))
        return Gaussian(x.mean * share, share * (x.var + (1 - share) * x.mean.square()))


for _dimensions in (1, 2, 3):
    _define(_dimensions)
