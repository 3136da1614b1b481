"""The layer and the link by torch functions, on any device, in any type; `on_cpu` and `on_gpu` have the same functions.

The forward passes are those of `formulas`; the backward passes, written by hand, make the fewest passes over an
activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian
from kalmannorm.kernels.arguments import Given, Options
from kalmannorm.kernels.formulas import (
    by_sample,
    fold_taps,
    for_samples,
    gain_of,
    layer_forward,
    link_forward,
    noise_share,
    normalize,
    predicted,
)
from kalmannorm.kernels.memory_format import dense
from kalmannorm.kernels.moments import slope_by_variance
from kalmannorm.kernels.rectify import rectified_gradients

__all__ = ["layer_backward", "layer_forward", "link_backward", "link_bias_gradient", "link_forward"]


def layer_backward(dy: Tensor, x: Tensor, given: Given, statistics: Tensor, d_belief: Tensor | None,
                   posterior: bool, options: Options) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of :func:`layer_forward`, whose ``statistics`` these are, by the formulas of
    `kalmannorm.kernels.layer`.

    ``d_belief``, ``(2, S, C, ...)`` or None for zeros, is of the posterior's mean and variance, or else the output's.
    Returns gradients of ``x``, prior, gain, noise, weight and bias, each like its tensor, and None where that is None.
    """
    posterior_mean, posterior_var, _, _, mean, var = statistics
    gamma = torch.ones_like(mean[0]) if given.weight is None else given.weight
    inverse = torch.rsqrt(posterior_var + options.eps)
    scale = inverse * gamma
    dy = dense(dy, x)
    if options.relu:
        before = normalize(x, Gaussian(posterior_mean, posterior_var), given.weight, given.bias, options.eps)
        dy = torch.where(before > 0, dy, 0)
    dx, sum_dyx, sum_dy = _through_normalization(dy, x, gamma.expand_as(mean), posterior_mean, posterior_var, options)

    sent = torch.zeros_like(statistics[:2]) if d_belief is None else d_belief.view(2, *mean.shape)
    nothing = torch.zeros_like(sent)
    by_posterior, by_output = (sent, nothing) if posterior else (nothing, sent)
    g_mean = by_posterior[0] - scale * sum_dy
    g_var = by_posterior[1] - 0.5 * scale * inverse * sum_dyx
    g_var = g_var + by_output[1] * gamma.square() * options.eps * inverse.square().square()
    by_observed, q, *of_filter = _through_fusion(g_mean, g_var, mean, var, given, options)

    count = x.numel() // mean.numel()
    slope = slope_by_variance(g_var * (q * (2 / count)), mean, var)
    dx = _add_line(dx, dy, x, scale, slope, by_observed / count - slope * mean)
    through_output = 2 * by_output[1] * gamma * posterior_var * inverse.square()
    d_weight = None if given.weight is None else (sum_dyx + through_output).sum(0)
    d_bias = None if given.bias is None else (sum_dy + by_output[0]).sum(0)
    return dx, *of_filter, d_weight, d_bias


def _through_normalization(dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, var: Tensor,
                           options: Options) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """``scale dy``, where torch computes it in the same pass; ``sum dy (x - m) / s`` and ``sum dy``, ``(S, C)``."""
    groups = options.groups
    wanted = [x.dtype == mean.dtype, True, True]  # terms that cancel may each be too large for half precision
    vectors = [for_samples(t, x) for t in (gamma, mean, var)]
    dx, *sums = torch.ops.aten.native_batch_norm_backward(
        by_sample(dy, groups), by_sample(x, groups), *vectors, None, None, False, options.eps, wanted
    )
    sum_dyx, sum_dy = (t[None] if groups == 1 else t.view(groups, -1, x.shape[1]).sum(1) for t in sums)
    return dx if wanted[0] else None, sum_dyx, sum_dy


def _add_line(dx: Tensor | None, dy: Tensor, x: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """``scale dy + slope x + offset``, in the memory of ``scale dy`` where there is that."""
    flat = by_sample(x, scale.shape[0])
    shape = (1, -1, *[1] * (flat.ndim - 2))
    scale, slope, offset = (for_samples(t, x).view(shape) for t in (scale, slope, offset))
    if dx is not None:
        dx.addcmul_(flat, slope).add_(offset)
    else:
        flat_dy = dy.reshape(flat.shape).to(scale.dtype)
        dx = torch.addcmul(offset, flat.to(scale.dtype), slope).addcmul_(flat_dy, scale).to(x.dtype)
    return dense(dx.view(x.shape), x)


def _through_fusion(g_mean: Tensor, g_var: Tensor, mean: Tensor, var: Tensor, given: Given,
                    options: Options) -> tuple[Any, ...]:  # fmt: skip
    """From the posterior's gradients: that of the observed mean, the gain, and those of prior, gain and noise."""
    q, gain, noise, d_gain = gain_of(given, options), given.gain, given.noise, None
    if given.prior is None:
        return g_mean, q, None, *(None if t is None else torch.zeros_like(t) for t in (gain, noise))
    prior = predicted(given, options)
    innovation = mean - prior.mean
    by_gain = var - prior.var
    by_observed, by_prior_mean = q * g_mean, (1 - q) * g_mean
    if options.spread:
        through_spread = (2 * q * (1 - q)) * innovation * g_var
        by_observed, by_prior_mean = by_observed + through_spread, by_prior_mean - through_spread
        by_gain = by_gain + (1 - 2 * q) * innovation.square()
    by_prior_var = (1 - q) * g_var if given.scale is None else (1 - q) * g_var * given.scale
    d_noise = None
    if noise is not None:  # by `v' = (1 + share) v`
        share = noise_share(noise, options.noise_scale)
        d_noise = (by_prior_var * given.prior.reshape(given.prior.shape[:3])[1]).sum(0) * share
        by_prior_var = by_prior_var * (1 + share)
    if gain is not None:
        d_gain = (g_mean * innovation + g_var * by_gain).sum().view(1)
        d_gain = d_gain * (options.gain_slope * q * (1 - q)) if options.gain_slope else d_gain
    by_prior = torch.stack([by_prior_mean, by_prior_var])
    by_prior = by_prior.sum(1, keepdim=True) if given.prior.shape[1] == 1 else by_prior
    return by_observed, q, by_prior.view(given.prior.shape), d_gain, d_noise


def link_backward(moments: Tensor, weight: Tensor, after: Tensor | None, d_out: Tensor, d_after: Tensor | None,
                  relu: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of moments and weight, from those of what :func:`link_forward` returned: ``d_out`` and, if the
    rectified moments ``after`` have other users, ``d_after``.
    """
    (d_mean, d_var), (m, v) = d_out.flatten(2).unbind(), (moments if after is None else after).flatten(2).unbind()
    sums, squares = fold_taps(weight)
    below = torch.stack([d_mean @ sums, d_var @ squares]).view(moments.shape)
    taps = [1] * (weight.ndim - 2)
    by_sum, by_square = ((a.mT @ b).view(*weight.shape[:2], *taps) for a, b in ((d_mean, m), (d_var, v)))
    d_weight = torch.addcmul(by_sum, weight, by_square, value=2)
    if relu:
        below = below if d_after is None else below + d_after
        below = torch.stack(rectified_gradients(*moments.unbind(), *below.unbind()))
    return below, d_weight


def link_bias_gradient(d_out: Tensor) -> Tensor:
    """The gradient of a link's bias, ``(C_out,)``, from that of its moments, ``(2, S, C_out, ...)``."""
    return d_out[0].flatten(1).sum(0)
