"""The layer and the link by torch functions, on any device, in any type; `on_cpu` and `on_gpu` have the same functions.

On a CPU, the fewest passes over an activation that torch offers: its statistics kernel, its normalization by given
statistics, and the backward pass of that, which returns ``sum dy`` and ``sum dy (x - m) / s`` along with ``dx``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.kernels.memory import dense
from kalmannorm.kernels.moments import observe_channels, slope_by_variance
from kalmannorm.kernels.options import Filter, Given, Running
from kalmannorm.kernels.rectify import rectified, rectified_gradients

__all__ = ["fuse", "gain_of", "layer_backward", "layer_forward", "link_backward", "link_bias_gradient",
           "link_forward", "move_running", "unbiased"]  # fmt: skip


def gain_of(gain: Tensor | None, like: Tensor, options: Filter) -> Tensor:
    """``q`` in (0, 1], ``(1,)``."""
    if gain is None:
        return like.new_full((1,), options.gain_offset)
    return torch.sigmoid(options.gain_slope * gain + options.gain_offset) if options.gain_slope else gain


def noise_of(noise: Tensor, options: Filter) -> Tensor:
    """``R``, ``(C,)``."""
    return options.noise_scale * noise.exp() if options.noise_scale else noise


def predicted(prior: Tensor, shift: Tensor | None, scale: Tensor | None, noise: Tensor | None,
              options: Filter) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and variance of the prior, corrected and with process noise: ``(1 or S, C)`` each."""
    mean, var = prior.reshape(prior.shape[:3]).unbind()
    var = var if noise is None else var + noise_of(noise, options)
    return mean if shift is None else mean + shift, var if scale is None else var * scale


def fuse(mean: Tensor, var: Tensor, given: Given, options: Filter) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior mean and variance, ``(S, C)``, and the gain, ``(1,)``, by functions that autograd knows."""
    prior = given.prior
    if prior is None:
        return mean, var, torch.ones_like(mean[0, :1])
    prior_mean, prior_var = predicted(prior, given.shift, given.scale, given.noise, options)
    q = gain_of(given.gain, prior, options)
    innovation = mean - prior_mean
    posterior_mean = prior_mean + q * innovation
    posterior_var = prior_var + q * (var - prior_var)
    if options.spread:
        posterior_var = posterior_var + q * (1 - q) * innovation.square()
    return posterior_mean, posterior_var, q


@torch.no_grad()
def move_running(running: Running, mean: Tensor, var: Tensor) -> None:
    """Move running statistics towards the newest, ``(S, C)`` each, averaged over groups. Channels whose newest are not
    finite keep their last value.
    """
    dtype = running.mean.dtype
    mean, var = ((t[0] if t.shape[0] == 1 else t.mean(0)).to(dtype) for t in (mean, var))
    finite = (mean + var).isfinite()
    running.batches.add_(1)
    running.nonfinite.add_(finite.all().logical_not())
    momentum = running.momentum.to(dtype) if isinstance(running.momentum, Tensor) else running.momentum
    for average, newest in ((running.mean, mean), (running.var, var)):
        average.lerp_(torch.where(finite, newest, average), momentum)


def unbiased(posterior_var: Tensor, gain: Tensor | float, observed_var: Tensor, count: int | Tensor) -> Tensor:
    """The fused variance, its observed share without bias: what running statistics average, as BatchNorm's do.

    Args:
        posterior_var: ``(S, C)``.
        gain: the share.
        observed_var: ``(S, C)``, biased.
        count: elements a channel of a group.
    """
    others = (count - 1).clamp_min(1) if isinstance(count, Tensor) else max(count - 1, 1)
    return posterior_var + gain * observed_var / others


def layer_forward(x: Tensor, given: Given, running: Running | None, options: Filter) -> tuple[Tensor, Tensor]:
    """Observe, fuse, normalize, perhaps rectify.

    Args:
        x: ``(N, C, *)``, not empty, dense in memory.
        given: the prior and the layer's vectors.
        running: what to move along, or None.
        options: the rest.

    Returns:
        The output, like ``x``; and ``(6, S, C)``: posterior mean and variance, the output's mean and variance, observed
        mean and (biased) variance.
    """
    groups, channels, weight, bias = options.groups, x.shape[1], given.weight, given.bias
    mean, var = _observe(x, groups)
    posterior_mean, posterior_var, q = fuse(mean, var, given, options)
    shrinkage = posterior_var / (posterior_var + options.eps)
    output_var = shrinkage if weight is None else shrinkage * weight.square()
    output_mean = torch.zeros_like(mean) if bias is None else bias.expand_as(mean)
    if running is not None:
        count = x.numel() // (groups * channels)
        move_running(running, posterior_mean, unbiased(posterior_var, q, var, count))
    y = _normalize(x, posterior_mean, posterior_var, weight, bias, options.eps)
    if options.relu:
        y = y.relu_()
    return y, torch.stack([posterior_mean, posterior_var, output_mean, output_var, mean, var])


def _blocks(x: Tensor, groups: int) -> tuple[Tensor, list[int]]:
    """``(S, N / S, C, *)``, and the axes that statistics are taken over."""
    return x.unflatten(0, (groups, -1)), [1, *range(3, x.ndim + 1)]


def _along(t: Tensor, x: Tensor) -> Tensor:
    """``(S, C)`` beside the blocks of ``x``."""
    return t.view(t.shape[0], 1, -1, *[1] * (x.ndim - 2))


def _observe(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    if groups == 1:
        mean, var = observe_channels(x)
        return mean[None], var[None]
    blocks, dims = _blocks(x.to(torch.promote_types(x.dtype, torch.float32)), groups)
    var, mean = torch.var_mean(blocks, dims, correction=0)
    return mean, var


def _normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if mean.shape[0] == 1:
        return F.batch_norm(x, mean[0], var[0], weight, bias, False, 0.0, eps)
    scale, shift = _line(mean, var, weight, bias, eps)
    blocks, _ = _blocks(x, mean.shape[0])
    y = torch.empty_like(x)  # no view, which could not be changed in place
    _blocks(y, mean.shape[0])[0].copy_(torch.addcmul(_along(shift, x), blocks.to(scale.dtype), _along(scale, x)))
    return y


def _line(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``y = scale x + shift``."""
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    return scale, -mean * scale if bias is None else bias - mean * scale


def layer_backward(dy: Tensor, x: Tensor, given: Given, statistics: Tensor, d_belief: Tensor | None,
                   posterior: bool, options: Filter) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of :func:`layer_forward`; the formulas are in `kalmannorm.kernels.layer`.

    Args:
        dy: like ``x``.
        x: see :func:`layer_forward`.
        given: see :func:`layer_forward`.
        statistics: as :func:`layer_forward` returned them.
        d_belief: of a mean and a variance, ``(2, S, C, ...)``, or None for zeros.
        posterior: whether these are the posterior's, and not the output's.
        options: see :func:`layer_forward`.

    Returns:
        Gradients of ``x``, prior, gain, noise, weight and bias, each like its tensor, and None where that is None.
    """
    prior, shift, scale, gain, noise, weight, bias = given
    posterior_mean, posterior_var, _, _, mean, var = statistics
    groups, channels = mean.shape
    count = x.numel() // mean.numel()
    inverse = torch.rsqrt(posterior_var + options.eps)
    factor, _ = _line(posterior_mean, posterior_var, weight, bias, options.eps)
    dy = dense(dy, x)
    if options.relu:
        before = _normalize(x, posterior_mean, posterior_var, weight, bias, options.eps)
        dy = torch.where(before > 0, dy, 0)
    dx, sum_dyx, sum_dy = _through_normalization(dy, x, posterior_mean, posterior_var, weight, factor, inverse, options)

    nothing = torch.zeros_like(mean)
    sent = (nothing, nothing) if d_belief is None else d_belief.view(2, groups, channels).unbind()
    (by_posterior_mean, by_posterior_var), (by_output_mean, by_output_var) = (
        (sent, (nothing, nothing)) if posterior else ((nothing, nothing), sent)
    )
    g_mean = by_posterior_mean - factor * sum_dy
    g_var = by_posterior_var - 0.5 * factor * inverse * sum_dyx
    gamma = torch.ones_like(mean[0]) if weight is None else weight
    g_var = g_var + by_output_var * gamma.square() * options.eps * inverse.square().square()
    by_observed, q = g_mean, torch.ones_like(mean[0, :1])
    d_prior = d_gain = d_noise = None
    if prior is not None:
        q = gain_of(gain, prior, options)
        prior_mean, prior_var = predicted(prior, shift, scale, noise, options)
        innovation = mean - prior_mean
        by_gain = var - prior_var
        by_observed, by_prior_mean = q * g_mean, (1 - q) * g_mean
        if options.spread:
            through_spread = (2 * q * (1 - q)) * innovation * g_var
            by_observed, by_prior_mean = by_observed + through_spread, by_prior_mean - through_spread
            by_gain = by_gain + (1 - 2 * q) * innovation.square()
        by_prior_var = (1 - q) * g_var if scale is None else (1 - q) * g_var * scale
        if gain is not None:
            d_gain = (g_mean * innovation + g_var * by_gain).sum().view(1)
            if options.gain_slope:
                d_gain = d_gain * (options.gain_slope * q * (1 - q))
        if noise is not None:
            d_noise = by_prior_var.sum(0) * (noise_of(noise, options) if options.noise_scale else 1)
        by_prior = torch.stack([by_prior_mean, by_prior_var])
        d_prior = (by_prior.sum(1, keepdim=True) if prior.shape[1] == 1 else by_prior).view(prior.shape)
    elif noise is not None:
        d_noise = torch.zeros_like(noise)
    if gain is not None and d_gain is None:
        d_gain = torch.zeros_like(gain)
    slope = slope_by_variance(g_var * (q * (2 / count)), mean, var)
    offset = by_observed / count - slope * mean
    dx = _add_line(dx, dy, x, factor, slope, offset)
    by_output = 2 * by_output_var * gamma * posterior_var * inverse.square()
    d_weight = None if weight is None else (sum_dyx + by_output).sum(0)
    d_bias = None if bias is None else (sum_dy + by_output_mean).sum(0)
    return dx, d_prior, d_gain, d_noise, d_weight, d_bias


def _through_normalization(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, scale: Tensor,
                           inverse: Tensor, options: Filter) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """``scale dy``, where torch computes it in the same pass; ``sum dy (x - m) / s`` and ``sum dy``, ``(S, C)``."""
    if mean.shape[0] == 1:
        wanted = [x.dtype == mean.dtype, True, True]  # terms that cancel may each be too large for half precision
        weight = torch.ones_like(mean[0]) if weight is None else weight
        dx, sum_dyx, sum_dy = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean[0], var[0], None, None, False, options.eps, wanted
        )
        return dx if wanted[0] else None, sum_dyx[None], sum_dy[None]
    blocks, dims = _blocks(dy.to(mean.dtype), mean.shape[0])
    centred = (_blocks(x.to(mean.dtype), mean.shape[0])[0] - _along(mean, x)) * _along(inverse, x)
    return None, (blocks * centred).sum(dims), blocks.sum(dims)


def _add_line(dx: Tensor | None, dy: Tensor, x: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """``scale dy + slope x + offset``, in the memory of ``scale dy`` where there is that."""
    if dx is not None:
        shape = (1, -1, *[1] * (x.ndim - 2))
        return dx.addcmul_(x, slope.view(shape)).add_(offset.view(shape))
    (x_blocks, _), (dy_blocks, _) = (_blocks(t.to(scale.dtype), scale.shape[0]) for t in (x, dy))
    moved = torch.addcmul(_along(offset, x), x_blocks, _along(slope, x)).addcmul_(dy_blocks, _along(scale, x))
    return dense(moved.flatten(0, 1).to(x.dtype), x)


def _fold(weight: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """A filter ``(out, in, *taps)`` and its square, each summed over its taps: ``(out, in)``."""
    if weight.ndim == 2:
        return weight, weight.square()
    taps = weight.flatten(2)
    return taps.sum(-1), taps.square().sum(-1)


def link_forward(moments: Tensor, weight: Tensor, bias: Tensor | None,
                 relu: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A Gaussian, rectified or not, through a convolution or linear map.

    Args:
        moments: mean and variance, ``(2, S, C_in, ...)``, axes behind of size 1.
        weight: ``(C_out, C_in, *taps)``, dense in memory.
        bias: ``(C_out,)`` or None.
        relu: whether it is rectified before.

    Returns:
        Mean and variance, ``(2, S, C_out, ...)``; and those that were rectified, like ``moments``, or None.
    """
    after = torch.stack(rectified(*moments.unbind())) if relu else None
    mean, var = (moments if after is None else after).flatten(2).unbind()
    sums, squares = _fold(weight, moments.shape[2])
    out = torch.stack([F.linear(mean, sums, bias), F.linear(var, squares)])
    return out.view(*out.shape, *moments.shape[3:]), after


def link_backward(moments: Tensor, weight: Tensor, after: Tensor | None, d_out: Tensor, d_after: Tensor | None,
                  relu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of :func:`link_forward`.

    Args:
        moments: see :func:`link_forward`, as ``weight``.
        weight: see ``moments``.
        after: the rectified moments, as returned, or None.
        d_out: ``(2, S, C_out, ...)``.
        d_after: what other users of the rectified moments send, like ``moments``, or None.
        relu: see :func:`link_forward`.

    Returns:
        Gradients of the moments and of the weight.
    """
    (d_mean, d_var), (m, v) = d_out.flatten(2).unbind(), (moments if after is None else after).flatten(2).unbind()
    sums, squares = _fold(weight, moments.shape[2])
    below = torch.stack([d_mean @ sums, d_var @ squares]).view(moments.shape)
    taps = [1] * (weight.ndim - 2)
    by_sum, by_square = ((a.mT @ b).view(*weight.shape[:2], *taps) for a, b in ((d_mean, m), (d_var, v)))
    d_weight = torch.addcmul(by_sum, weight, by_square, value=2)
    if relu:
        below = below if d_after is None else below + d_after
        below = torch.stack(rectified_gradients(*moments.unbind(), *below.unbind()))
    return below, d_weight


def link_bias_gradient(d_out: Tensor) -> Tensor:
    """The gradient of a link's bias, ``(C_out,)``, from what comes to its moments, ``(2, S, C_out, ...)``."""
    return d_out[0].flatten(1).sum(0)
