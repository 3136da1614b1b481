"""The layer and the link on a CUDA device, by the kernels of ``triton_layer.py`` and ``triton_link.py``. The signatures
are those of `on_torch`.

At batches of 1 to 4 samples a launch takes longer than the kernel, so launches count. Where a statistic group's channel
fits into the registers of one program, the layer takes one each way; with a prior, torch then sums the gain's gradient
over channels. Larger ones take three each way: sums of chunks, a number a channel, the normalization. Several groups
take one more: for running statistics, or for sums over groups. A link takes one forward and two backward.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalmannorm.kernels.arguments import Given, Options, Running
from kalmannorm.kernels.memory_format import dense, is_channels_last

# Elements that one program can hold in its registers, backward too, where there are two tensors of them.
_HELD = 16384
# Bytes of a tile where a channel has more: two loads of 16 bytes a thread, of 8 warps.
_TILE = 8192
# Programs of 8 warps to divide large sums among: twelve for each multiprocessor of an H200, which runs three at a time.
_PROGRAMS = 1584
# An activation of so many bytes stays in a GPU's L2 cache.
_CACHED = 2**23
# Programs that can count themselves, of which a channel has one at most: see `_move` in `triton_layer`.
_COUNTABLE = 32767


@functools.cache
def is_available() -> bool:
    """Whether there is Triton, and all that it needs for this GPU."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_device()
    except Exception as error:  # a missing C compiler, mostly; Triton has no type for it
        warnings.warn(f"kalmannorm runs without its CUDA kernels: Triton does not work here: {error}", stacklevel=2)
        return False
    return True


@functools.cache
def _kernels(name: str) -> Any:
    """Imported when needed: not all platforms have Triton."""
    return importlib.import_module(f"kalmannorm.kernels.{name}")


def _on_device_of(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, wherever its arguments are."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()


def _empty(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _divide_up(number: int, by: int) -> int:
    return -(-number // by)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _aligned(length: int, itemsize: int) -> int:
    """The largest power of two that divides a length, up to 16 bytes."""
    return min(length & -length, 16 // itemsize)


class _Walk(NamedTuple):
    """How the kernels of the layer go over an activation ``(rows, channels, pixels)``."""

    shape: tuple[int, int, int]  # channels, pixels, and rows of a group
    # Rows, channels and pixels of a tile; whether channels are innermost; what the innermost length is a multiple of.
    tile: tuple[int, int, int, bool, int]
    held: bool  # whether a group's channel is one tile, which one program holds
    programs: int  # groups times blocks of channels
    tiles: int  # of each of these
    chunk: int  # tiles that one program goes over for its sums
    chunks: int
    warps: int


def _tile_channels_last(samples: int, rows: int, channels: int, itemsize: int) -> tuple[int, int, int]:
    """All rows of a few channels, at least 16 or 32 bytes side by side; else, 128 bytes of channels."""
    wide, long = _power_of_two(channels), _power_of_two(rows)
    least = (16 if samples * channels * rows * itemsize <= _CACHED else 32) // itemsize
    across = min(wide, max(least, min(4096 // long, 64)))
    if long * across <= _HELD:
        return long, across, 1
    across = 128 // itemsize
    across = min(wide, across // 2 if 0 < channels % across <= across // 2 else across)
    return _TILE // itemsize // across, across, 1


def _tile_channels_first(rows: int, channels: int, pixels: int, itemsize: int) -> tuple[int, int, int]:
    """All rows and pixels, and some channels if a row has less than 32 bytes; else the shape with the least left over,
    where one of half the elements must save a sixteenth.
    """
    tall, long, most = _power_of_two(rows), _power_of_two(pixels), _TILE // itemsize
    across = min(_power_of_two(channels), max(1, 32 // long))
    if tall * across * long <= _HELD:
        return tall, across, long
    room = max(1, 2**30 // (channels * pixels))  # offsets within a tile have 32 bits
    covers = []
    for b in (long, *(most >> halvings for halvings in range(6))):
        a = min(tall, most // (b * across), 1 << (room.bit_length() - 1))
        if a and b <= long:
            covered = _divide_up(rows, a) * a * _divide_up(pixels, b) * b
            covers.append((covered * (16 + most / (a * b * across)), (a, across, b)))
    return min(covers)[1]


@functools.lru_cache(maxsize=4096)
def _walk(size: tuple[int, ...], last: bool, groups: int, itemsize: int) -> _Walk:
    """Choose tiles for an activation of a size, the axis that is contiguous in memory innermost.

    Where a group's channel fits, a tile is all of it, with a thread for each 8 elements up to 16 warps. Else chunks of
    tiles are so long that all multiprocessors have work.
    """
    samples, channels = size[:2]
    pixels = math.prod(size[2:])
    rows = samples // groups
    last = last or pixels == 1
    if last:
        rows, pixels = rows * pixels, 1
        tile = _tile_channels_last(samples, rows, channels, itemsize)
    else:
        tile = _tile_channels_first(rows, channels, pixels, itemsize)
    elements = math.prod(tile)
    held = elements <= _HELD and tile[0] >= rows and tile[2] >= pixels
    programs = groups * _divide_up(channels, tile[1])
    tiles = _divide_up(rows, tile[0]) * _divide_up(pixels, tile[2])
    chunk = _divide_up(tiles, min(tiles, _divide_up(_PROGRAMS, programs)))
    warps = min(16, max(1, elements // 256 if held else elements * itemsize // 1024))
    return _Walk(
        (channels, pixels, rows), (*tile, last, _aligned(channels if last else pixels, itemsize)), held, programs,
        tiles, chunk, _divide_up(tiles, chunk), warps,
    )  # fmt: skip


def _merging(walk: _Walk, groups: int) -> tuple[int, int, int, int]:
    """Programs that merge chunks, their warps, and how many chunks and channels one of them has at a time."""
    chunks = min(_power_of_two(walk.chunks), 512)
    return _divide_up(groups * walk.shape[0], 8), max(1, chunks // 64), chunks, 8


def layer_forward(x: Tensor, given: Given, running: Running | None, options: Options) -> tuple[Tensor, Tensor]:
    """See :func:`kalmannorm.kernels.formulas.layer_forward`."""
    kernels = _kernels("triton_layer")
    groups, _, slope, offset, noise_scale, spread, eps, relu = options
    walk = _walk(x.shape, is_channels_last(x), groups, x.itemsize)
    channels, pixels, rows = walk.shape
    y = torch.empty_like(x)
    statistics = _empty(x, 6, groups, channels)
    prior_size = 0 if given.prior is None else given.prior.numel() // 2
    if given.prior is None:
        given, offset = given._replace(gain=None), 1.0
    moved_here = running is not None and groups == 1 and channels <= _COUNTABLE
    moved: Any = running if moved_here else (None, None, None, None, 0.0)
    with _on_device_of(x):
        if walk.held:
            kernels.forward_kernel[(walk.programs,)](
                x, y, statistics, *given, *moved, channels, pixels, rows, groups, prior_size, slope, offset,
                noise_scale, spread, eps, relu, *walk.tile, num_warps=walk.warps,
            )  # fmt: skip
        else:
            parts = _empty(x, walk.chunks, 3, groups, channels)
            kernels.moments_kernel[(walk.programs * walk.chunks,)](
                x, parts, channels, pixels, rows, groups, walk.tiles, walk.chunk, *walk.tile, num_warps=walk.warps
            )
            programs, warps, *merged = _merging(walk, groups)
            kernels.fuse_kernel[(programs,)](
                parts, statistics, *given, *moved, channels, groups, walk.chunks, prior_size, slope, offset,
                noise_scale, spread, eps, *merged, num_warps=warps,
            )  # fmt: skip
            kernels.apply_kernel[(walk.programs * walk.tiles,)](
                x, y, statistics, given.weight, given.bias, channels, pixels, rows, groups, walk.tiles, eps, relu,
                *walk.tile, num_warps=walk.warps,
            )  # fmt: skip
        if running is not None and not moved_here:
            kernels.running_kernel[(_divide_up(channels, 128),)](
                statistics, given.gain, *running, rows * pixels, channels, groups, slope, offset, 128
            )
    return y, statistics


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def layer_backward(dy: Tensor, x: Tensor, given: Given, statistics: Tensor, d_belief: Tensor | None,
                   posterior: bool, options: Options) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See :func:`kalmannorm.kernels.on_torch.layer_backward`."""
    kernels = _kernels("triton_layer")
    groups, _, *constants, relu = options
    eps = options.eps
    walk = _walk(x.shape, is_channels_last(x), groups, x.itemsize)
    channels, pixels, rows = walk.shape
    dy = dense(dy, x)
    dx = torch.empty_like(x)
    terms = _empty(x, 6, groups * channels)
    d_belief = _contiguous(d_belief)
    prior_size = 0 if given.prior is None else given.prior.numel() // 2
    with _on_device_of(x):
        if walk.held:
            kernels.backward_kernel[(walk.programs,)](
                dy, x, dx, statistics, terms, d_belief, *given, channels, pixels, rows, groups, prior_size, posterior,
                *constants, relu, *walk.tile, num_warps=walk.warps,
            )  # fmt: skip
        else:
            parts = _empty(x, walk.chunks, 2, groups, channels)
            line = _empty(x, 2, groups, channels)
            kernels.sums_kernel[(walk.programs * walk.chunks,)](
                dy, x, parts, statistics, given.weight, given.bias, channels, pixels, rows, groups, walk.tiles,
                walk.chunk, eps, relu, *walk.tile, num_warps=walk.warps,
            )  # fmt: skip
            programs, warps, *merged = _merging(walk, groups)
            kernels.gradients_kernel[(programs,)](
                parts, line, statistics, terms, d_belief, *given[:6], rows * pixels, channels,
                groups, walk.chunks, prior_size, posterior, *constants, *merged, num_warps=warps,
            )  # fmt: skip
            kernels.input_gradient_kernel[(walk.programs * walk.tiles,)](
                dy, x, dx, line, statistics, given.weight, given.bias, channels, pixels, rows, groups, walk.tiles, eps,
                relu, *walk.tile, num_warps=walk.warps,
            )  # fmt: skip
        return (dx, *_gradients(terms, groups, given))


def _gradients(terms: Tensor, groups: int, given: Given) -> tuple[Tensor | None, ...]:
    """Shares of groups and channels, ``(6, S * C)``, added up to gradients of prior, gain, noise, weight and bias."""
    totals = terms if groups == 1 else terms.view(6, groups, -1).sum(1)
    prior, gain, noise = given.prior, given.gain, given.noise
    d_weight = None if given.weight is None else totals[0]
    d_bias = None if given.bias is None else totals[1]
    if prior is None:  # those rows were not written
        d_gain, d_noise = (None if t is None else torch.zeros_like(t) for t in (gain, noise))
        return None, d_gain, d_noise, d_weight, d_bias
    by_prior = totals[2:4] if prior.shape[1] == 1 else terms[2:4]
    d_gain = None if gain is None else torch.sum(totals[4], 0, True)
    return by_prior.view_as(prior), d_gain, None if noise is None else totals[5], d_weight, d_bias


class _Blocks(NamedTuple):
    """How the kernels of the link go over a weight ``(rows, columns)``."""

    taps: int
    last: bool
    align: int
    forward: tuple[int, int, int]  # rows and columns that a program reads at a time, and its warps
    backward: tuple[int, int, int]  # rows and columns of a program's tile, and its warps
    chunks: int  # of rows, whose sums go down to the moments
    tiles: int


@functools.lru_cache(maxsize=4096)
def _blocks(size: tuple[int, ...], last: bool, itemsize: int) -> _Blocks:
    """Choose blocks for a weight: few rows a program where there are few, so that all multiprocessors have some."""
    rows, channels = size[:2]
    taps = math.prod(size[2:])
    columns = channels * taps
    r = 4 if rows >= 2048 else 2 if rows >= 1024 else 1
    f = max(32, min(4096 // r, _power_of_two(columns)))
    forward = (r, f, max(1, r * f // 256))
    r, f = 32, max(32, min(128, _power_of_two(columns)))
    while r > 8 and _divide_up(rows, r) * _divide_up(columns, f) < _PROGRAMS // 2:
        r //= 2
    backward = (r, f, max(1, r * f // 512))
    chunks = _divide_up(rows, r)
    return _Blocks(taps, last, _aligned(columns, itemsize), forward, backward, chunks, chunks * _divide_up(columns, f))


def link_forward(moments: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor | None]:
    """See :func:`kalmannorm.kernels.formulas.link_forward`."""
    _, groups, channels, *ones = moments.shape
    rows = weight.shape[0]
    blocks = _blocks(weight.shape, is_channels_last(weight), weight.itemsize)
    out = _empty(moments, 2, groups, rows, *ones)
    rectified = torch.empty_like(moments) if relu else None
    r, f, warps = blocks.forward
    with _on_device_of(moments):
        _kernels("triton_link").contract_kernel[(groups * _divide_up(rows, r),)](
            moments, weight, bias, out, rectified, rows, channels, groups, blocks.taps, blocks.last, r, f,
            blocks.align, num_warps=warps,
        )  # fmt: skip
    return out, rectified


def link_backward(moments: Tensor, weight: Tensor, after: Tensor | None, d_out: Tensor, d_after: Tensor | None,
                  relu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`kalmannorm.kernels.on_torch.link_backward`."""
    kernels = _kernels("triton_link")
    _, groups, channels, *_ = moments.shape
    rows = weight.shape[0]
    blocks = _blocks(weight.shape, is_channels_last(weight), weight.itemsize)
    d_weight, below = torch.empty_like(weight), torch.empty_like(moments)
    parts = _empty(moments, blocks.chunks, 2, groups, channels * blocks.taps)
    r, f, warps = blocks.backward
    with _on_device_of(moments):
        kernels.weight_gradient_kernel[(blocks.tiles,)](
            moments if after is None else after, weight, d_out.contiguous(), d_weight, parts, rows, channels, groups,
            blocks.taps, blocks.last, r, f, blocks.align, num_warps=warps,
        )  # fmt: skip
        kernels.moment_gradients_kernel[(groups * _divide_up(channels, 8),)](
            moments, _contiguous(d_after), parts, below, channels, groups, blocks.chunks, relu, blocks.taps,
            blocks.last, min(128, _power_of_two(blocks.chunks * blocks.taps)), 8,
        )  # fmt: skip
    return below, d_weight
