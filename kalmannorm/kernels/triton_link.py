"""Kernels of the link on a GPU: a Gaussian rectified, and through a convolution or linear map.

The mathematics is that of `rectify` and `link`. The weight is the one large thing here: ``(out, in * taps)`` in memory,
or ``(out, taps * in)`` where channels are last. Forward, a program reads a few of its rows once, for both moments.
Backward, a program writes a tile's gradient and its share of the moments'; shares are summed in a fixed order.

``moments`` are mean and variance, ``(2, groups, in)``. So is ``rectified``, after the ReLU; None where there is none.
"""
# Triton has no types for mypy to check, and a kernel's arguments are its pointers and sizes.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["rows", "channels", "groups", "chunks"]
_TINY = tl.constexpr(1.0842e-19)  # the square root of the smallest normal float32


@triton.jit
def _standardize(mean, var):
    """``s``, ``a = m / s``, ``Phi(a)``, ``Phi(-a)`` and ``phi(a)``.

    The smaller of the two probabilities is a Chebyshev fit to ``erfc`` (Press et al., Numerical Recipes, 6.2), right
    to 1.2e-7 of itself however small it is, which ``1 - erf`` is not.
    """
    std = tl.sqrt(tl.maximum(var, _TINY))
    a = tl.minimum(tl.maximum(mean / std, -1e3), 1e3)
    square = -0.5 * a * a
    t = 1 / (1 + tl.abs(a) * 0.35355339059327373)
    fit = -0.82215223 + t * 0.17087277
    fit = -1.13520398 + t * (1.48851587 + t * fit)
    fit = -0.18628806 + t * (0.27886807 + t * fit)
    fit = 0.37409196 + t * (0.09678418 + t * fit)
    fit = -1.26551223 + t * (1.00002368 + t * fit)
    tail = 0.5 * t * tl.exp(square + fit)
    above = tl.where(a > 0, 1 - tail, tail)
    below = tl.where(a > 0, tail, 1 - tail)
    return std, a, above, below, tl.exp(square) * 0.3989422804014327


@triton.jit
def _rectify(mean, var):
    std, a, above, below, density = _standardize(mean, var)
    positive = density + a * above
    negative = density - a * below
    return tl.where(a > 30, mean, std * positive), var * tl.maximum(above - positive * negative, 0.0)


@triton.jit
def _channel(column, channels, TAPS: tl.constexpr, LAST: tl.constexpr):
    """The channel whose moments a column of the weight meets."""
    return column % channels if LAST else column // TAPS


@triton.jit(do_not_specialize=_SIZES)
def contract_kernel(moments, weight, bias, out, rectified, rows, channels, groups, TAPS: tl.constexpr,
                    LAST: tl.constexpr, R: tl.constexpr, F: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """``m W^T + b`` and ``v (W^2)^T``: ``out`` is ``(2, groups, rows)``. A program a group and ``R`` rows."""
    group, block = tl.program_id(0) % groups, tl.program_id(0) // groups
    row = block * R + tl.arange(0, R)
    columns = channels * TAPS // ALIGN * ALIGN
    at_row = weight + row.to(tl.int64)[:, None] * columns
    sum_mean = tl.zeros((R, F), tl.float32)
    sum_var = tl.zeros((R, F), tl.float32)
    for start in range(0, columns, F):
        column = start + tl.arange(0, F)
        inside = column < columns
        w = tl.load(at_row + column[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        at = group * channels + _channel(column, channels, TAPS, LAST)
        m = tl.load(moments + at, mask=inside, other=0.0)
        v = tl.load(moments + groups * channels + at, mask=inside, other=0.0)
        if rectified is not None:
            m, v = _rectify(m, v)
            if block == 0:  # of the programs and columns that meet a channel, one writes
                own = column < channels if LAST else inside & (column % TAPS == 0)
                tl.store(rectified + at, m, mask=own)
                tl.store(rectified + groups * channels + at, v, mask=own)
        sum_mean += w * m[None, :]
        sum_var += w * w * v[None, :]
    total = tl.sum(sum_mean, 1)
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + group * rows + row, total, mask=row < rows)
    tl.store(out + (groups + group) * rows + row, tl.sum(sum_var, 1), mask=row < rows)


@triton.jit(do_not_specialize=_SIZES)
def weight_gradient_kernel(moments, weight, d_out, d_weight, parts, rows, channels, groups, TAPS: tl.constexpr, LAST:
                           tl.constexpr, R: tl.constexpr, F: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """``dm^T m + 2 W (dv^T v)``, and of each ``R`` rows ``dm W`` and ``dv W^2``: ``(chunks, 2, groups, columns)``.

    ``moments`` are those after a ReLU, ``d_out`` is ``(2, groups, rows)``. A program a tile of ``R`` rows and ``F``
    columns.
    """
    columns = channels * TAPS // ALIGN * ALIGN
    blocks = tl.cdiv(columns, F)
    chunk = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * F + tl.arange(0, F)
    row = chunk * R + tl.arange(0, R)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at_weight = row.to(tl.int64)[:, None] * columns + column[None, :]
    w = tl.load(weight + at_weight, mask=inside, other=0.0).to(tl.float32)
    by_mean = tl.zeros((R, F), tl.float32)
    by_var = tl.zeros((R, F), tl.float32)
    for group in range(groups):
        at = group * channels + _channel(column, channels, TAPS, LAST)
        m = tl.load(moments + at, mask=column < columns, other=0.0)
        v = tl.load(moments + groups * channels + at, mask=column < columns, other=0.0)
        dm = tl.load(d_out + group * rows + row, mask=row < rows, other=0.0)[:, None]
        dv = tl.load(d_out + (groups + group) * rows + row, mask=row < rows, other=0.0)[:, None]
        by_mean += dm * m[None, :]
        by_var += dv * v[None, :]
        at = parts + (chunk.to(tl.int64) * 2 * groups + group) * columns + column
        tl.store(at, tl.sum(w * dm, 0), mask=column < columns)
        tl.store(at + groups * columns, tl.sum(w * w * dv, 0), mask=column < columns)
    gradient = by_mean + 2 * w * by_var
    tl.store(d_weight + at_weight, gradient.to(d_weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def moment_gradients_kernel(moments, d_rectified, parts, below, channels, groups, chunks, RELU: tl.constexpr, TAPS:
                            tl.constexpr, LAST: tl.constexpr, P: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Sums over chunks and taps, through the ReLU: ``below`` is ``(2, groups, channels)``.

    A program a group and ``C`` channels.
    """
    group = tl.program_id(0) % groups
    channel = tl.program_id(0) // groups * C + tl.arange(0, C)
    here = channel < channels
    at = group * channels + channel
    columns = channels * TAPS
    d_mean = tl.zeros((C,), tl.float32)
    d_var = tl.zeros((C,), tl.float32)
    for start in range(0, chunks * TAPS, P):
        part = start + tl.arange(0, P)[:, None]
        chunk, tap = part // TAPS, part % TAPS
        column = channel[None, :] * TAPS + tap
        if LAST:
            column = tap * channels + channel[None, :]
        pointer = parts + (chunk.to(tl.int64) * 2 * groups + group) * columns + column
        inside = (chunk < chunks) & here[None, :]
        d_mean += tl.sum(tl.load(pointer, mask=inside, other=0.0), 0)
        d_var += tl.sum(tl.load(pointer + groups * columns, mask=inside, other=0.0), 0)
    if RELU:
        if d_rectified is not None:
            d_mean += tl.load(d_rectified + at, mask=here, other=0.0)
            d_var += tl.load(d_rectified + groups * channels + at, mask=here, other=0.0)
        m = tl.load(moments + at, mask=here, other=0.0)
        v = tl.load(moments + groups * channels + at, mask=here, other=1.0)
        std, a, above, beneath, density = _standardize(m, v)
        positive = density + a * above
        by_mean = d_mean * above + d_var * (2 * std * positive * beneath)
        d_var = d_mean * (density / (2 * std)) + d_var * (above - positive * density)
        d_mean = by_mean
    tl.store(below + at, d_mean, mask=here)
    tl.store(below + groups * channels + at, d_var, mask=here)
