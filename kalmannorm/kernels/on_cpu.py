"""The layer, the link and activations on a CPU, in float32, by ``native.c``. The signatures are those of `on_torch`.

A layer's input and output may be of half precision: they are converted before and after.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kalmannorm.kernels.arguments import Given, Options, Running
from kalmannorm.kernels.autograd import constant_to_compilers
from kalmannorm.kernels.memory_format import dense, in_type, is_channels_last
from kalmannorm.kernels.native import library
from kalmannorm.kernels.rectify import Moments, Slopes

# The structures of native.c, members in their order: q is a pointer or an int64, f a float, i an int32.
_LAYER = "9q4f2i4q2i"  # Inputs, Shape
_FORWARD = struct.Struct(f"@{_LAYER}7qf")
_BACKWARD = struct.Struct(f"@{_LAYER}10q4q")
_LINK = "9q4i"
_LINK_FORWARD = struct.Struct(f"@{_LINK}q")
_LINK_BACKWARD = struct.Struct(f"@{_LINK}6q")
MOST_BREAKS = 3
_ACTIVATION = struct.Struct(f"@6q2i{4 * MOST_BREAKS + 3}d")
_FUNCTIONS = ("pieces", "silu", "sigmoid", "gelu")  # as in native.c


@constant_to_compilers
def is_available() -> bool:
    """Whether the kernels could be compiled."""
    return library() is not None


def _at(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _both_at(t: Tensor | None) -> tuple[int, int]:
    """A mean and a variance, ``(2, ...)``."""
    return (0, 0) if t is None else (t.data_ptr(), t.data_ptr() + 2 * t.numel())  # half of it, at 4 bytes a number


def _layer(x: Tensor, given: Given, options: Options) -> tuple[Any, ...]:
    groups, _, slope, offset, noise_scale, spread, eps, relu = options
    samples, channels, *_ = shape = x.shape
    prior = given.prior
    return (
        *_both_at(prior), *_at(*given[1:]),
        1 if prior is None else prior.shape[1], slope, offset, noise_scale, eps, spread, relu, samples, channels,
        shape.numel() // (samples * channels), groups, is_channels_last(x), torch.get_num_threads(),
    )  # fmt: skip


def layer_forward(x: Tensor, given: Given, running: Running | None, options: Options) -> tuple[Tensor, Tensor]:
    """See :func:`kalmannorm.kernels.formulas.layer_forward`."""
    dtype, x = x.dtype, in_type(x, torch.float32)
    y = torch.empty_like(x)
    statistics = x.new_empty(6, options.groups, x.shape[1])
    moved = (0, 0, 0, 0, 0.0) if running is None else (*_at(*running[:4]), running.momentum)
    library().layer_forward(_FORWARD.pack(*_layer(x, given, options), *_at(x, y, statistics), *moved))
    return in_type(y, dtype), statistics


def layer_backward(dy: Tensor, x: Tensor, given: Given, statistics: Tensor, d_belief: Tensor | None,
                   posterior: bool, options: Options) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See :func:`kalmannorm.kernels.on_torch.layer_backward`."""
    dtype, dy, x = x.dtype, in_type(dense(dy, x), torch.float32), in_type(x, torch.float32)
    dx = torch.empty_like(x)
    results = [None if t is None else torch.empty_like(t) for t in (given.prior, *given[3:])]
    d_prior, *others = results
    sent = _both_at(None if d_belief is None else (d_belief := d_belief.contiguous()))
    library().layer_backward(_BACKWARD.pack(
        *_layer(x, given, options),
        *((*sent, 0, 0) if posterior else (0, 0, *sent)), *_both_at(d_prior),
        *_at(*others, dy, x, statistics, dx),
    ))  # fmt: skip
    return (in_type(dx, dtype), *results)


def _link(moments: Tensor, weight: Tensor, bias: Tensor | None, after: Tensor | None, relu: bool) -> tuple[Any, ...]:
    _, groups, channels, *_ = moments.shape
    out = weight.shape[0]
    address = weight.data_ptr()
    if not address:
        raise RuntimeError(
            f"got a weight of shape {tuple(weight.shape)} whose memory was freed, expected one that stays until the "
            "next normalization layer was called"
        )
    return (
        *_both_at(moments), address, *_at(bias, after), groups, channels, out,
        weight.numel() // (out * channels), weight.is_contiguous(), relu, torch.get_num_threads(), 0,
    )  # fmt: skip


def link_forward(moments: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor | None]:
    """See :func:`kalmannorm.kernels.formulas.link_forward`."""
    _, groups, _, *ones = moments.shape
    out = moments.new_empty(2, groups, weight.shape[0], *ones)
    after = torch.empty_like(moments) if relu else None
    library().link_forward(_LINK_FORWARD.pack(*_link(moments, weight, bias, after, relu), out.data_ptr()))
    return out, after


def link_backward(moments: Tensor, weight: Tensor, after: Tensor | None, d_out: Tensor, d_after: Tensor | None,
                  relu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`kalmannorm.kernels.on_torch.link_backward`."""
    below, d_weight = torch.empty_like(moments), torch.empty_like(weight)
    d_out = d_out.contiguous()
    d_after = None if d_after is None else d_after.contiguous()
    library().link_backward(_LINK_BACKWARD.pack(
        *_link(moments, weight, None, after, relu), *_both_at(d_out), *_both_at(d_after),
        *_at(below, d_weight),
    ))  # fmt: skip
    return below, d_weight


def activation(mean: Tensor, var: Tensor, compiled: Sequence[Any]) -> tuple[Moments, Slopes]:
    """The moments behind an activation, and their slopes.

    ``compiled`` is the name of the activation, one of ``_FUNCTIONS``; after ``"pieces"`` come the breaks, up to
    ``MOST_BREAKS``, and the pieces, see :func:`kalmannorm.rules.pointwise.piecewise`.
    """
    name, breaks, pieces = compiled if len(compiled) > 1 else (*compiled, [], [])
    numbers = [*breaks, *[0.0] * (MOST_BREAKS - len(breaks)), *[c for piece in pieces for c in piece]]
    numbers += [0.0] * (4 * MOST_BREAKS + 3 - len(numbers))
    after, slopes = (torch.empty_like(mean), torch.empty_like(var)), mean.new_empty(4, *mean.shape)
    library().activation(_ACTIVATION.pack(
        *_at(mean, var, *after, slopes), mean.numel(), _FUNCTIONS.index(name), len(breaks), *numbers
    ))  # fmt: skip
    return after, slopes.unbind()
