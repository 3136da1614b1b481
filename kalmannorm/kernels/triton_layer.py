"""Kernels of the layer on a GPU: observe, fuse with the prior, normalize; the ReLU behind it.

The mathematics is that of `layer`; `on_gpu` says which kernels are launched. An activation is ``(rows, C, pixels)`` in
memory: ``(N, C, H * W)`` where it is contiguous, ``(N * H * W, C, 1)`` where channels are last. It is read in tiles
``(A, K, B)`` of rows, channels and pixels, innermost the axis that is contiguous in memory: pixels, or channels
(``LAST``). That axis is a multiple of ``ALIGN`` elements, 16 bytes if possible, which a thread loads at once. A
statistic group is a block of consecutive rows. A program has a group and a block of ``K`` channels.

Sums over tiles are kept element by element and reduced at the end. Chunks of tiles are merged in a fixed order, and no
float is added atomically: two runs agree bit for bit.

``statistics`` is ``(6, groups, channels)``: posterior mean and variance, output mean and variance, observed mean and
variance. Pointers may be None (no prior, no affine map); each choice is compiled for itself. ``where`` is
``(at, channel, here, size)``, see :func:`_place`; ``given`` is ``(prior, prior_shift, prior_scale, gain, noise,
prior_size)``.
"""
# Triton has no types for mypy to check, and a kernel's arguments are its pointers and sizes.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# Sizes and small vectors vary from layer to layer without any gain from code of their own.
_SIZES = ["channels", "pixels", "rows", "groups", "tiles", "chunk", "chunks", "prior_size", "count", "momentum"]
_VECTORS = ["prior", "prior_shift", "prior_scale", "gain", "noise", "running_mean", "running_var", "d_belief"]


def _jit(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        do_not_specialize=[name for name in _SIZES if name in names],
        do_not_specialize_on_alignment=[name for name in _VECTORS if name in names],
    )(function)


# ---- walking over memory ----


@triton.jit
def _whole(length, ALIGN: tl.constexpr):
    """The same number; but the compiler sees that it can be divided, and so loads several elements at once."""
    return length // ALIGN * ALIGN


@triton.jit
def _tile(group, block, tile, channels, pixels, rows, A: tl.constexpr, K: tl.constexpr, B: tl.constexpr,
          LAST: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Where a tile of a group starts, its elements' offsets from there, which there are, and how many a channel."""
    a = tl.arange(0, A)[:, None, None]
    k = tl.arange(0, K)[None, :, None]
    b = tl.arange(0, B)[None, None, :]
    if LAST:
        channels = _whole(channels, ALIGN)
        row = tile * A
        start = (group * rows + row).to(tl.int64) * channels + block * K
        offset = a * channels + k + b
        inside = (row + a < rows) & (block * K + k < channels) & (b < 1)
        count = tl.minimum(rows - row, A)
    else:
        pixels = _whole(pixels, ALIGN)
        along = tl.cdiv(pixels, B)
        row, pixel = tile // along * A, tile % along * B
        start = ((group * rows + row).to(tl.int64) * channels + block * K) * pixels + pixel
        offset = a * (channels * pixels) + k * pixels + b
        inside = (row + a < rows) & (block * K + k < channels) & (pixel + b < pixels)
        count = tl.minimum(rows - row, A) * tl.minimum(pixels - pixel, B)
    return start, offset, inside, count.to(tl.float32)


@triton.jit
def _place(channels, groups, K: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr):
    """A program's group, block of channels, and chunk or tile; its channels, and which exist; where their numbers are
    among those of all groups and channels, and how many these are.
    """
    if LAST:
        channels = _whole(channels, ALIGN)
    blocks = tl.cdiv(channels, K)
    program = tl.program_id(0) % (groups * blocks)
    group, block = program // blocks, program % blocks
    channel = block * K + tl.arange(0, K)
    part = tl.program_id(0) // (groups * blocks)
    return group, block, part, channel, channel < channels, group * channels + channel, groups * channels


@triton.jit
def _load(pointer, start, offset, inside):
    return tl.load(pointer + start + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, start, offset, inside, value):
    tl.store(pointer + start + offset, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _sum(tile):
    """Of each channel."""
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def _spread_out(vector):
    """A number a channel, to meet a tile."""
    return vector[None, :, None]


@triton.jit
def _or(pointer, at, here, default: tl.constexpr):
    """A number a channel, or its default where none is given."""
    value = tl.zeros_like(at).to(tl.float32) + default
    if pointer is not None:
        value = tl.load(pointer + at, mask=here, other=default)
    return value


# ---- a number a channel ----


@triton.jit
def _gain(gain, GAIN_SLOPE: tl.constexpr, gain_offset):
    q = gain_offset
    if gain is not None:
        q = tl.load(gain)
        if GAIN_SLOPE != 0:
            q = 1 / (1 + tl.exp(-(GAIN_SLOPE * q + gain_offset)))
    return q


@triton.jit
def _prior(given, where, NOISE_SCALE: tl.constexpr):
    """Mean, variance with process noise, and its slopes by the variance without and by the logarithm of the noise.

    A prior of one group serves all.
    """
    at, channel, here, _ = where
    prior, prior_shift, prior_scale, _, noise, prior_size = given
    mean = tl.load(prior + at % prior_size, mask=here, other=0.0) + _or(prior_shift, channel, here, 0.0)
    var = tl.load(prior + prior_size + at % prior_size, mask=here, other=0.0)
    factor = _or(prior_scale, channel, here, 1.0)
    slope, by_noise = factor, factor
    if noise is not None:
        share = NOISE_SCALE * tl.exp(_or(noise, channel, here, 0.0))
        slope, by_noise = factor * (1 + share), factor * share * var
    return mean, slope * var, slope, by_noise


@triton.jit
def _move(running, channel, here, mean, var):
    """Running statistics, of each channel for which the newest are finite; and the two counters.

    Each program adds itself to ``batches``, above the 32 bits that count batches: 15 bits count programs, and 15 those
    with a channel that is not finite. The last program puts both counters right.
    """
    running_mean, running_var, batches, nonfinite, momentum = running
    finite = tl.abs(mean + var) <= 3.4028235e38
    moved = here & finite
    last_mean = tl.load(running_mean + channel, mask=moved, other=0.0)
    last_var = tl.load(running_var + channel, mask=moved, other=0.0)
    tl.store(running_mean + channel, last_mean + momentum * (mean - last_mean), mask=moved)
    tl.store(running_var + channel, last_var + momentum * (var - last_var), mask=moved)
    lost = tl.max((here & (finite == 0)).to(tl.int32), 0).to(tl.int64)
    own = (lost << 47) + 4294967296
    seen = tl.atomic_add(batches, own) + own
    last = ((seen >> 32) & 32767) == tl.num_programs(0)
    tl.store(batches, (seen & 4294967295) + 1, mask=last)
    lost_any = last & ((seen >> 47) != 0)
    tl.store(nonfinite, tl.load(nonfinite, mask=lost_any, other=0) + 1, mask=lost_any)


@triton.jit
def _fuse(mean, var, n, where, statistics, given, weight, bias, running, GAIN_SLOPE: tl.constexpr,
          gain_offset, NOISE_SCALE: tl.constexpr, SPREAD: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """Write the statistics of some channels, update their running statistics; return the posterior."""
    at, channel, here, size = where
    prior, _, _, gain, _, _ = given
    q = 1.0
    posterior_mean = mean
    posterior_var = var
    if prior is not None:
        q = _gain(gain, GAIN_SLOPE, gain_offset)
        p_mean, p_var, _, _ = _prior(given, where, NOISE_SCALE)
        innovation = mean - p_mean
        posterior_mean = p_mean + q * innovation
        posterior_var = p_var + q * (var - p_var)
        if SPREAD:
            posterior_var += q * (1 - q) * innovation * innovation
    gamma = _or(weight, channel, here, 1.0)
    tl.store(statistics + at, posterior_mean, mask=here)
    tl.store(statistics + size + at, posterior_var, mask=here)
    tl.store(statistics + 2 * size + at, _or(bias, channel, here, 0.0), mask=here)
    tl.store(statistics + 3 * size + at, gamma * gamma * (posterior_var / (posterior_var + EPS)), mask=here)
    tl.store(statistics + 4 * size + at, mean, mask=here)
    tl.store(statistics + 5 * size + at, var, mask=here)
    if running[0] is not None:
        newest_var = posterior_var + q * var / tl.maximum(n - 1, 1.0)
        _move(running, channel, here, posterior_mean, newest_var)
    return posterior_mean, posterior_var


@triton.jit
def _line(statistics, weight, bias, where, EPS: tl.constexpr):
    """``m``, ``1 / s``, ``gamma / s`` and ``beta``, to meet a tile."""
    at, channel, here, size = where
    mean = tl.load(statistics + at, mask=here, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.load(statistics + size + at, mask=here, other=1.0) + EPS)
    scale = _or(weight, channel, here, 1.0) * inverse
    return _spread_out(mean), _spread_out(inverse), _spread_out(scale), _spread_out(_or(bias, channel, here, 0.0))


@triton.jit
def _through_fusion(g_mean, g_var, mean, var, where, given, terms, GAIN_SLOPE: tl.constexpr,
                    gain_offset, NOISE_SCALE: tl.constexpr, SPREAD: tl.constexpr):  # fmt: skip
    """Write ``terms`` of prior, gain and noise; return the observed mean's, and ``q``."""
    at, _, here, size = where
    _, _, _, gain, noise, _ = given
    q = _gain(gain, GAIN_SLOPE, gain_offset)
    p_mean, p_var, slope, slope_by_noise = _prior(given, where, NOISE_SCALE)
    innovation = mean - p_mean
    by_observed = q * g_mean
    by_prior_mean = (1 - q) * g_mean
    by_gain = var - p_var
    if SPREAD:
        through_spread = 2 * q * (1 - q) * innovation * g_var
        by_observed += through_spread
        by_prior_mean -= through_spread
        by_gain += (1 - 2 * q) * innovation * innovation
    by_gain = g_mean * innovation + g_var * by_gain
    if gain is not None and GAIN_SLOPE != 0:
        by_gain *= GAIN_SLOPE * q * (1 - q)
    tl.store(terms + 2 * size + at, by_prior_mean, mask=here)
    tl.store(terms + 3 * size + at, (1 - q) * g_var * slope, mask=here)
    tl.store(terms + 4 * size + at, by_gain, mask=here)
    if noise is not None:
        tl.store(terms + 5 * size + at, (1 - q) * g_var * slope_by_noise, mask=here)
    return by_observed, q


@triton.jit
def _gradients(sum_dy, sum_dyx, n, where, statistics, given, weight, d_belief, terms, POSTERIOR: tl.constexpr,
               GAIN_SLOPE: tl.constexpr, gain_offset, NOISE_SCALE: tl.constexpr, SPREAD: tl.constexpr,
               EPS: tl.constexpr):  # fmt: skip
    """Write each group and channel's share of every gradient; return mean, slope and offset of ``dx``.

    ``terms`` is ``(6, groups, channels)``: of weight, bias, prior mean, prior variance, gain and noise. Without a prior
    only the first two are written.
    """
    at, channel, here, size = where
    v = tl.load(statistics + size + at, mask=here, other=1.0)
    mean = tl.load(statistics + 4 * size + at, mask=here, other=0.0)
    var = tl.load(statistics + 5 * size + at, mask=here, other=0.0)
    gamma = _or(weight, channel, here, 1.0)
    inverse = 1.0 / tl.sqrt(v + EPS)
    line = gamma * inverse
    g_mean = -line * sum_dy
    g_var = -0.5 * line * inverse * sum_dyx
    by_weight = sum_dyx
    by_bias = sum_dy
    if d_belief is not None:
        sent_mean = tl.load(d_belief + at, mask=here, other=0.0)
        sent_var = tl.load(d_belief + size + at, mask=here, other=0.0)
        if POSTERIOR:
            g_mean += sent_mean
            g_var += sent_var
        else:
            g_var += sent_var * (line * line * EPS * inverse * inverse)
            by_weight += 2 * sent_var * line * v * inverse
            by_bias += sent_mean
    tl.store(terms + at, by_weight, mask=here)
    tl.store(terms + size + at, by_bias, mask=here)
    by_observed = g_mean
    q = 1.0
    if given[0] is not None:
        by_observed, q = _through_fusion(
            g_mean, g_var, mean, var, where, given, terms, GAIN_SLOPE, gain_offset, NOISE_SCALE, SPREAD
        )  # fmt: skip
    # A constant channel's deviations are nothing but rounding: see `slope_by_variance`.
    rounding = mean * (8 * 1.1920929e-7)
    return mean, tl.where(var > rounding * rounding, g_var * (2 * q / n), 0.0), by_observed / n


@triton.jit
def _rectified(y, RELU: tl.constexpr):
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # a maximum would make zero of NaN
    return y


@triton.jit
def _masked(dy, x, mean, scale, beta, RELU: tl.constexpr):
    """The gradient in front of the ReLU, whose mask is computed again."""
    if RELU:
        dy = tl.where((x - mean) * scale + beta > 0, dy, 0.0)
    return dy


# ---- forward ----


@_jit
def forward_kernel(x, y, statistics, prior, prior_shift, prior_scale, gain, noise, weight, bias, running_mean,
                   running_var, batches, nonfinite, momentum, channels, pixels, rows, groups, prior_size, GAIN_SLOPE:
                   tl.constexpr, gain_offset, NOISE_SCALE: tl.constexpr, SPREAD: tl.constexpr, EPS:
                   tl.constexpr, RELU: tl.constexpr, A: tl.constexpr, K: tl.constexpr, B: tl.constexpr, LAST:
                   tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """All of the forward pass, where a group's channel is one tile. A program a group and channel block."""
    group, block, _, channel, here, at, size = _place(channels, groups, K, LAST, ALIGN)
    start, offset, inside, n = _tile(group, block, 0, channels, pixels, rows, A, K, B, LAST, ALIGN)
    value = _load(x, start, offset, inside)
    mean = _sum(value) / n
    deviation = tl.where(inside, value - _spread_out(mean), 0.0)
    var = _sum(deviation * deviation) / n
    given = prior, prior_shift, prior_scale, gain, noise, prior_size
    running = running_mean, running_var, batches, nonfinite, momentum
    m, v = _fuse(
        mean, var, n, (at, channel, here, size), statistics, given, weight, bias, running, GAIN_SLOPE, gain_offset,
        NOISE_SCALE, SPREAD, EPS,
    )  # fmt: skip
    scale = _spread_out(_or(weight, channel, here, 1.0) * (1.0 / tl.sqrt(v + EPS)))
    value = (value - _spread_out(m)) * scale + _spread_out(_or(bias, channel, here, 0.0))
    _store(y, start, offset, inside, _rectified(value, RELU))


@_jit
def moments_kernel(x, parts, channels, pixels, rows, groups, tiles, chunk, A: tl.constexpr, K: tl.constexpr,
                   B: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Count, mean and squared deviations of each chunk of tiles: ``parts`` is ``(chunks, 3, groups, channels)``.

    Deviations are from the mean of its first tile, whose rounding is at most the number of tiles times worse.
    """
    group, block, part, _, here, at, size = _place(channels, groups, K, LAST, ALIGN)
    first = part * chunk
    start, offset, inside, n = _tile(group, block, first, channels, pixels, rows, A, K, B, LAST, ALIGN)
    value = _load(x, start, offset, inside)
    centre = _sum(value) / n
    sums = tl.where(inside, value - _spread_out(centre), 0.0)
    squares = sums * sums
    for tile in tl.range(first + 1, tl.minimum(first + chunk, tiles), loop_unroll_factor=4):
        start, offset, inside, count = _tile(group, block, tile, channels, pixels, rows, A, K, B, LAST, ALIGN)
        value = tl.where(inside, _load(x, start, offset, inside) - _spread_out(centre), 0.0)
        sums += value
        squares += value * value
        n += count
    shift = _sum(sums) / n
    at = parts + part.to(tl.int64) * 3 * size + at
    tl.store(at, n + tl.zeros_like(shift), mask=here)
    tl.store(at + size, centre + shift, mask=here)
    tl.store(at + 2 * size, tl.maximum(_sum(squares) - n * shift * shift, 0.0), mask=here)


@_jit
def fuse_kernel(parts, statistics, prior, prior_shift, prior_scale, gain, noise, weight, bias, running_mean,
                running_var, batches, nonfinite, momentum, channels, groups, chunks, prior_size, GAIN_SLOPE:
                tl.constexpr, gain_offset, NOISE_SCALE: tl.constexpr, SPREAD: tl.constexpr, EPS:
                tl.constexpr, P: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Merge chunks, and fuse with the prior. A program for each ``C`` of ``groups * channels``."""
    size = groups * channels
    at = tl.program_id(0) * C + tl.arange(0, C)
    here = at < size
    first = tl.load(parts + size + at, mask=here, other=0.0)  # a mean, so that differences are summed
    n = tl.zeros((C,), tl.float32)
    total = tl.zeros((C,), tl.float32)
    for start in range(0, chunks, P):
        part = start + tl.arange(0, P)[:, None]
        pointer = parts + part.to(tl.int64) * 3 * size + at[None, :]
        inside = (part < chunks) & here[None, :]
        count = tl.load(pointer, mask=inside, other=0.0)
        n += tl.sum(count, 0)
        total += tl.sum(count * (tl.load(pointer + size, mask=inside, other=0.0) - first[None, :]), 0)
    n = tl.maximum(n, 1.0)
    mean = first + total / n
    squares = tl.zeros((C,), tl.float32)
    for start in range(0, chunks, P):
        part = start + tl.arange(0, P)[:, None]
        pointer = parts + part.to(tl.int64) * 3 * size + at[None, :]
        inside = (part < chunks) & here[None, :]
        deviation = tl.load(pointer + size, mask=inside, other=0.0) - mean[None, :]
        count = tl.load(pointer, mask=inside, other=0.0)
        squares += tl.sum(count * deviation * deviation + tl.load(pointer + 2 * size, mask=inside, other=0.0), 0)
    given = prior, prior_shift, prior_scale, gain, noise, prior_size
    running = running_mean, running_var, batches, nonfinite, momentum
    _fuse(
        mean, squares / n, n, (at, at % channels, here, size), statistics, given, weight, bias, running, GAIN_SLOPE,
        gain_offset, NOISE_SCALE, SPREAD, EPS,
    )  # fmt: skip


@_jit
def apply_kernel(x, y, statistics, weight, bias, channels, pixels, rows, groups, tiles, EPS: tl.constexpr,
                 RELU: tl.constexpr, A: tl.constexpr, K: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr,
                 ALIGN: tl.constexpr):  # fmt: skip
    """``y = gamma (x - m) / s + beta``, and what follows. A program a tile.

    The last tile comes first: it was read last and may still be in the cache.
    """
    group, block, tile, channel, here, at, size = _place(channels, groups, K, LAST, ALIGN)
    start, offset, inside, _ = _tile(group, block, tiles - 1 - tile, channels, pixels, rows, A, K, B, LAST, ALIGN)
    value = _load(x, start, offset, inside)
    mean, _, scale, beta = _line(statistics, weight, bias, (at, channel, here, size), EPS)
    value = _rectified((value - mean) * scale + beta, RELU)
    _store(y, start, offset, inside, value)


@_jit
def running_kernel(statistics, gain, running_mean, running_var, batches, nonfinite, momentum, count, channels, groups,
                   GAIN_SLOPE: tl.constexpr, gain_offset, C: tl.constexpr):  # fmt: skip
    """Running statistics from the averages over groups. ``count`` elements a channel in a group; ``C`` channels."""
    channel = tl.program_id(0) * C + tl.arange(0, C)
    here = channel < channels
    size = groups * channels
    unbiased = _gain(gain, GAIN_SLOPE, gain_offset) / tl.maximum(count - 1, 1).to(tl.float32)
    mean = tl.zeros((C,), tl.float32)
    var = tl.zeros((C,), tl.float32)
    for group in range(groups):
        at = statistics + group * channels + channel
        mean += tl.load(at, mask=here, other=0.0)
        var += tl.load(at + size, mask=here, other=0.0) + unbiased * tl.load(at + 5 * size, mask=here, other=0.0)
    running = running_mean, running_var, batches, nonfinite, momentum
    _move(running, channel, here, mean / groups, var / groups)


# ---- backward ----


@_jit
def backward_kernel(dy, x, dx, statistics, terms, d_belief, prior, prior_shift, prior_scale, gain,
                    noise, weight, bias, channels, pixels, rows, groups, prior_size, POSTERIOR: tl.constexpr,
                    GAIN_SLOPE: tl.constexpr, gain_offset, NOISE_SCALE: tl.constexpr, SPREAD:
                    tl.constexpr, EPS: tl.constexpr, RELU: tl.constexpr, A: tl.constexpr, K: tl.constexpr, B:
                    tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """All of the backward pass, where a group's channel is one tile. A program a group and channel block."""
    group, block, _, channel, here, at, size = _place(channels, groups, K, LAST, ALIGN)
    start, offset, inside, n = _tile(group, block, 0, channels, pixels, rows, A, K, B, LAST, ALIGN)
    value = _load(x, start, offset, inside)
    gradient = _load(dy, start, offset, inside)
    mean, inverse, scale, beta = _line(statistics, weight, bias, (at, channel, here, size), EPS)
    gradient = _masked(gradient, value, mean, scale, beta, RELU)
    given = prior, prior_shift, prior_scale, gain, noise, prior_size
    centre, slope, level = _gradients(
        _sum(gradient), _sum(gradient * (value - mean) * inverse), n, (at, channel, here, size), statistics, given,
        weight, d_belief, terms, POSTERIOR, GAIN_SLOPE, gain_offset, NOISE_SCALE, SPREAD, EPS,
    )  # fmt: skip
    value = scale * gradient + (value - _spread_out(centre)) * _spread_out(slope) + _spread_out(level)
    _store(dx, start, offset, inside, value)


@_jit
def sums_kernel(dy, x, parts, statistics, weight, bias, channels, pixels, rows, groups, tiles, chunk,
                EPS: tl.constexpr, RELU: tl.constexpr, A: tl.constexpr, K: tl.constexpr, B: tl.constexpr,
                LAST: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """``sum dy`` and ``sum dy (x - m) / s`` of each chunk of tiles: ``parts`` is ``(chunks, 2, groups, channels)``."""
    group, block, part, channel, here, at, size = _place(channels, groups, K, LAST, ALIGN)
    mean, inverse, scale, beta = _line(statistics, weight, bias, (at, channel, here, size), EPS)
    sums = tl.zeros((A, K, B), tl.float32)
    products = tl.zeros((A, K, B), tl.float32)
    first = part * chunk
    for tile in tl.range(first, tl.minimum(first + chunk, tiles), loop_unroll_factor=2):
        start, offset, inside, _ = _tile(group, block, tile, channels, pixels, rows, A, K, B, LAST, ALIGN)
        value = _load(x, start, offset, inside)
        gradient = _load(dy, start, offset, inside)
        gradient = _masked(gradient, value, mean, scale, beta, RELU)
        sums += gradient
        products += gradient * (value - mean)
    at = parts + part.to(tl.int64) * 2 * size + at
    tl.store(at, _sum(sums), mask=here)
    tl.store(at + size, _sum(products * inverse), mask=here)


@_jit
def gradients_kernel(parts, line, statistics, terms, d_belief, prior, prior_shift, prior_scale, gain, noise, weight,
                     count, channels, groups, chunks, prior_size, POSTERIOR: tl.constexpr, GAIN_SLOPE: tl.constexpr,
                     gain_offset, NOISE_SCALE: tl.constexpr, SPREAD: tl.constexpr, EPS: tl.constexpr, P:
                     tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Merge chunks; all gradients but that of ``x``, whose ``line`` is ``(2, groups, channels)``, slope and offset.

    ``count`` elements a channel in a group. A program for each ``C`` of ``groups * channels``.
    """
    size = groups * channels
    at = tl.program_id(0) * C + tl.arange(0, C)
    here = at < size
    sum_dy = tl.zeros((C,), tl.float32)
    sum_dyx = tl.zeros((C,), tl.float32)
    for start in range(0, chunks, P):
        part = start + tl.arange(0, P)[:, None]
        pointer = parts + part.to(tl.int64) * 2 * size + at[None, :]
        inside = (part < chunks) & here[None, :]
        sum_dy += tl.sum(tl.load(pointer, mask=inside, other=0.0), 0)
        sum_dyx += tl.sum(tl.load(pointer + size, mask=inside, other=0.0), 0)
    given = prior, prior_shift, prior_scale, gain, noise, prior_size
    _, slope, level = _gradients(
        sum_dy, sum_dyx, count.to(tl.float32), (at, at % channels, here, size), statistics, given, weight, d_belief,
        terms, POSTERIOR, GAIN_SLOPE, gain_offset, NOISE_SCALE, SPREAD, EPS,
    )  # fmt: skip
    tl.store(line + at, slope, mask=here)
    tl.store(line + size + at, level, mask=here)


@_jit
def input_gradient_kernel(dy, x, dx, line, statistics, weight, bias, channels, pixels, rows, groups,
                          tiles, EPS: tl.constexpr, RELU: tl.constexpr, A: tl.constexpr, K: tl.constexpr,
                          B: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """``dx``. A program a tile, the last one first."""
    group, block, tile, channel, here, at, size = _place(channels, groups, K, LAST, ALIGN)
    start, offset, inside, _ = _tile(group, block, tiles - 1 - tile, channels, pixels, rows, A, K, B, LAST, ALIGN)
    value = _load(x, start, offset, inside)
    gradient = _load(dy, start, offset, inside)
    mean, _, scale, beta = _line(statistics, weight, bias, (at, channel, here, size), EPS)
    gradient = _masked(gradient, value, mean, scale, beta, RELU)
    centre = _spread_out(tl.load(statistics + 4 * size + at, mask=here, other=0.0))
    slope = _spread_out(tl.load(line + at, mask=here, other=0.0))
    level = _spread_out(tl.load(line + size + at, mask=here, other=0.0))
    _store(dx, start, offset, inside, scale * gradient + (value - centre) * slope + level)
