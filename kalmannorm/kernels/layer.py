"""The whole layer in one step: observe, fuse with the prior, normalize.

With ``q`` the gain, ``n`` the elements a channel, ``d = x_bar - m_prior``, ``v_prior`` with its process
noise, and ``k = q (1 - q)`` where the spread of the two means counts (else 0):

    m = m_prior + q d
    v = v_prior + q (S - v_prior) + k d^2
    y = gamma (x - m) / s + beta                     s = sqrt(v + eps)

Backward, the gradients of the posterior collect what comes through ``y`` and what the layers above send:

    g_m = dm - gamma / s sum dy
    g_v = dv - gamma / (2 s^2) sum dy (x - m) / s

and reach the prior, the gain and the observation, and through it ``x``:

    d v_prior = (1 - q) g_v
    d m_prior = (1 - q) g_m - 2 k d g_v
    d q  = sum over channels of  g_m d + g_v (S - v_prior + (1 - 2 q) d^2)
    dx = gamma / s dy + (q g_m + 2 k d g_v + 2 q g_v (x - x_bar)) / n

which is ``a dy + b x + c`` for each channel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.kernels.apply import direct
from kalmannorm.kernels.moments import moments, observe_channels, slope_by_variance
from kalmannorm.kernels.standardize import standardize

__all__ = ["layer"]


def _plain(x: Tensor, prior_mean: Tensor, prior_var: Tensor, gain: Tensor, weight: Tensor, bias: Tensor,
           spread: bool, eps: float) -> tuple[Tensor, ...]:  # fmt: skip
    """The same by functions that autograd knows, for the gradient of a gradient and for torch.compile."""
    mean, var = moments(x.to(prior_mean.dtype))
    innovation = mean - prior_mean
    posterior_mean = prior_mean + gain * innovation
    posterior_var = prior_var + gain * (var - prior_var)
    if spread:
        posterior_var = posterior_var + gain * (1 - gain) * innovation.square()
    y = standardize(x, posterior_mean, posterior_var, weight, bias, eps)
    return y, posterior_mean, posterior_var, mean.detach(), var.detach()


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, prior_mean: Tensor, prior_var: Tensor, gain: Tensor, weight: Tensor,  # type: ignore[override]
                bias: Tensor, spread: bool, eps: float) -> tuple[Tensor, ...]:  # fmt: skip
        mean, var = observe_channels(x)
        posterior_mean = torch.lerp(prior_mean, mean, gain)
        posterior_var = torch.lerp(prior_var, var, gain)
        if spread:
            innovation = mean - prior_mean
            posterior_var.addcmul_(innovation * (gain * (1 - gain)), innovation)
        y = F.batch_norm(x, posterior_mean, posterior_var, weight, bias, False, 0.0, eps)
        return y, posterior_mean, posterior_var, mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, prior_mean, prior_var, gain, weight, bias, ctx.spread, ctx.eps = inputs
        _, posterior_mean, posterior_var, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(
            x, prior_mean, prior_var, gain, weight, bias, posterior_mean, posterior_var, mean, var
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor, d_mean: Tensor, d_var: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # once: a checkpoint allows no more
        inputs = saved[:6]
        if torch.is_grad_enabled():
            return _differentiable_backward(inputs, ctx.spread, ctx.eps, (dy, d_mean, d_var))
        x, prior_mean, prior_var, gain, weight, _ = inputs
        posterior_mean, posterior_var, mean, var = saved[6:]
        narrow = x.dtype != mean.dtype
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, posterior_mean, posterior_var, None, None, False, ctx.eps, [not narrow, True, True]
        )
        inverse = torch.rsqrt(posterior_var + ctx.eps)
        scale = weight * inverse
        g_mean = torch.addcmul(d_mean, scale, d_bias, value=-1)
        g_var = torch.addcmul(d_var, scale * inverse, d_weight, value=-0.5)
        innovation = mean - prior_mean
        d_observed, d_prior_mean = gain * g_mean, (1 - gain) * g_mean
        by_gain = var - prior_var
        if ctx.spread:
            through_spread = (2 * gain * (1 - gain)) * innovation * g_var
            d_observed += through_spread
            d_prior_mean -= through_spread
            by_gain = by_gain + (1 - 2 * gain) * innovation.square()
        d_gain = None
        if ctx.needs_input_grad[3]:
            d_gain = (g_mean.dot(innovation) + g_var.dot(by_gain)).view(1)
        count = x.numel() // x.shape[1]
        slope = slope_by_variance(g_var * (gain * (2 / count)), mean, var)
        offset = d_observed / count - slope * mean
        shape = (1, -1, *[1] * (x.ndim - 2))
        slope, offset = slope.view(shape), offset.view(shape)
        if narrow:  # terms that cancel may each be too large for half precision
            dx = torch.addcmul(offset, x.to(slope.dtype), slope).addcmul_(dy, scale.view(shape)).to(x.dtype)
        else:
            dx = dx.addcmul_(x, slope).add_(offset)
        return dx, d_prior_mean, (1 - gain) * g_var, d_gain, d_weight, d_bias, None, None


def _differentiable_backward(inputs: tuple[Tensor, ...], spread: bool, eps: float,
                             upstream: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:  # fmt: skip
    x, prior_mean, prior_var, gain, weight, bias = inputs
    outputs = _plain(x, prior_mean, prior_var, gain, weight, bias, spread, eps)[:3]
    wanted = [t for t in inputs if t.requires_grad]
    gradients = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True))
    return (*(next(gradients) if t.requires_grad else None for t in inputs), None, None)


_apply = direct(_Layer, _plain)


def layer(x: Tensor, prior_mean: Tensor, prior_var: Tensor, gain: Tensor, weight: Tensor, bias: Tensor,
          spread: bool, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Normalize by the whole batch's statistics, fused with a prior.

    Args:
        x: ``(N, C, *)``, not empty.
        prior_mean: ``(C,)``, at least float32.
        prior_var: ``(C,)``, process noise included.
        gain: ``(1,)``.
        weight: ``(C,)``.
        bias: ``(C,)``.
        spread: count the distance of the two means into the variance.
        eps: added to the variance.

    Returns:
        The output, shaped and typed as ``x``; posterior mean and variance, ``(C,)``; and, without a
        gradient, observed mean and variance, ``(C,)``.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _apply(
        x, prior_mean, prior_var, gain, weight, bias, spread, eps
    )
    return result
