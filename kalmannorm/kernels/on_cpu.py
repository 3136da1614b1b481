"""The layer and the link on a CPU, in float32, by ``native.c``. The signatures are those of `on_torch`."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from kalmannorm.kernels.memory import dense, is_channels_last
from kalmannorm.kernels.native import library
from kalmannorm.kernels.options import Filter, Running

__all__ = ["is_available", "layer_backward", "layer_forward", "link_backward", "link_forward"]


class _Filter(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("prior_mean", "prior_var", "gain", "noise", "weight", "bias")],
        ("prior_groups", c_int64),
        *[(name, c_float) for name in ("gain_slope", "gain_offset", "noise_scale", "eps")],
        ("spread", c_int32), ("relu", c_int32),
    ]  # fmt: skip


class _Shape(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("samples", "channels", "pixels", "groups")],
        ("channels_last", c_int32), ("threads", c_int32),
    ]  # fmt: skip


class _Gradients(Structure):
    _fields_ = [
        (name, c_void_p) for name in (
            "d_posterior_mean", "d_posterior_var", "d_output_mean", "d_output_var",
            "d_prior_mean", "d_prior_var", "d_gain", "d_noise", "d_weight", "d_bias",
        )
    ]  # fmt: skip


class _Link(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("groups", "channels_in", "channels_out", "taps")],
        ("taps_inside", c_int32), ("relu", c_int32), ("threads", c_int32),
    ]  # fmt: skip


def _declare(native: ctypes.CDLL) -> ctypes.CDLL:
    p, f, s, g, link = c_void_p, POINTER(_Filter), POINTER(_Shape), POINTER(_Gradients), POINTER(_Link)
    native.layer_forward.argtypes = [p, p, p, f, s, p, p, p, p, p, c_float]
    native.layer_backward.argtypes = [p, p, p, p, p, f, g, s, p]
    native.link_forward.argtypes = [p, p, p, p, link, p, p]
    native.link_backward.argtypes = [p, p, p, p, p, p, p, p, link, p, p]
    for function in (native.layer_forward, native.layer_backward, native.link_forward, native.link_backward):
        function.restype = None
    return native


_native: Any = None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available() -> bool:
    """Whether the kernels could be compiled. The first call compiles them."""
    global _native  # noqa: PLW0603
    if _native is None:
        found = library()
        _native = False if found is None else _declare(found)
    return _native is not False


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _filter(prior_mean: Tensor | None, prior_var: Tensor | None, gain: Tensor | None, noise: Tensor | None,
            weight: Tensor | None, bias: Tensor | None, options: Filter) -> _Filter:  # fmt: skip
    return _Filter(
        _at(prior_mean), _at(prior_var), _at(gain), _at(noise), _at(weight), _at(bias),
        1 if prior_mean is None else prior_mean.shape[0], options.gain_slope, options.gain_offset,
        options.noise_scale, options.eps, options.spread, options.relu,
    )  # fmt: skip


def _shape(x: Tensor, groups: int) -> _Shape:
    samples, channels = x.shape[:2]
    pixels = x.numel() // (samples * channels)
    return _Shape(samples, channels, pixels, groups, is_channels_last(x), torch.get_num_threads())


def layer_forward(x: Tensor, other: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None,
                  gain: Tensor | None, noise: Tensor | None, weight: Tensor | None, bias: Tensor | None,
                  running: Running | None, options: Filter) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`kalmannorm.kernels.on_torch.layer_forward`."""
    y = torch.empty_like(x)
    statistics = x.new_empty(6, options.groups, x.shape[1])
    moved = (None, None, None, None, 0.0) if running is None else (
        running.mean.data_ptr(), running.var.data_ptr(), running.batches.data_ptr(), running.nonfinite.data_ptr(),
        running.momentum,
    )  # fmt: skip
    _native.layer_forward(
        x.data_ptr(), _at(other), y.data_ptr(), _filter(prior_mean, prior_var, gain, noise, weight, bias, options),
        _shape(x, options.groups), statistics.data_ptr(), *moved,
    )  # fmt: skip
    return y, statistics


def layer_backward(dy: Tensor, x: Tensor, y: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None,
                   gain: Tensor | None, noise: Tensor | None, weight: Tensor | None, bias: Tensor | None,
                   statistics: Tensor, d_posterior_mean: Tensor | None, d_posterior_var: Tensor | None,
                   d_output_mean: Tensor | None, d_output_var: Tensor | None,
                   options: Filter) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See :func:`kalmannorm.kernels.on_torch.layer_backward`."""
    dy = dense(dy, x)
    dx = torch.empty_like(x)
    d_other = None if y is None else torch.empty_like(x)
    results = [None if t is None else torch.empty_like(t) for t in (prior_mean, prior_var, gain, noise, weight, bias)]
    sent = (d_posterior_mean, d_posterior_var, d_output_mean, d_output_var)
    above = [None if t is None else t.contiguous() for t in sent]
    _native.layer_backward(
        dy.data_ptr(), x.data_ptr(), _at(y), dx.data_ptr(), _at(d_other),
        _filter(prior_mean, prior_var, gain, noise, weight, bias, options), _Gradients(*map(_at, (*above, *results))),
        _shape(x, options.groups), statistics.data_ptr(),
    )  # fmt: skip
    return (dx, d_other, *results)


def _link(mean: Tensor, weight: Tensor, relu: bool) -> _Link:
    groups, channels = mean.shape[:2]
    taps = weight.numel() // (weight.shape[0] * channels)
    return _Link(groups, channels, weight.shape[0], taps, weight.is_contiguous(), relu, torch.get_num_threads())


def link_forward(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None,
                 relu: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See :func:`kalmannorm.kernels.on_torch.link_forward`."""
    out = mean.new_empty(2, mean.shape[0], weight.shape[0])
    rectified = mean.new_empty(2, mean.shape[0], mean.shape[1]) if relu else None
    _native.link_forward(
        mean.data_ptr(), var.data_ptr(), weight.data_ptr(), _at(bias), _link(mean, weight, relu), _at(rectified),
        out.data_ptr(),
    )  # fmt: skip
    return out, rectified


def link_backward(mean: Tensor, var: Tensor, weight: Tensor, rectified: Tensor | None, d_mean: Tensor, d_var: Tensor,
                  d_rectified_mean: Tensor | None, d_rectified_var: Tensor | None,
                  relu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`kalmannorm.kernels.on_torch.link_backward`."""
    d_below = mean.new_empty(2, mean.shape[0], mean.shape[1])
    d_weight = torch.empty_like(weight)
    d_mean, d_var = d_mean.contiguous(), d_var.contiguous()
    if d_rectified_mean is not None:
        d_rectified_mean = d_rectified_mean.contiguous()
    if d_rectified_var is not None:
        d_rectified_var = d_rectified_var.contiguous()
    _native.link_backward(
        mean.data_ptr(), var.data_ptr(), weight.data_ptr(), _at(rectified), d_mean.data_ptr(), d_var.data_ptr(),
        _at(d_rectified_mean), _at(d_rectified_var), _link(mean, weight, relu), d_below.data_ptr(),
        d_weight.data_ptr(),
    )  # fmt: skip
    return d_below, d_weight
