"""The whole layer in one step: observe, fuse with the prior, normalize; perhaps add, perhaps rectify.

With ``q`` the gain, ``n`` the elements a channel of a group, ``d = x_bar - m_prior``, ``v_prior`` with its process
noise ``R``, and ``k = q (1 - q)`` where the spread of the two means counts (else 0):

    m = m_prior + q d
    v = v_prior + q (S - v_prior) + k d^2
    y = gamma (x - m) / s + beta                     s = sqrt(v + eps)

and the output is believed to have mean ``beta`` and variance ``u = gamma^2 v / s^2``.

Backward, the gradients of the posterior collect what comes through ``y`` and what the layers above send:

    g_m = dm - gamma / s sum dy
    g_v = dv - gamma / (2 s^2) sum dy (x - m) / s + du gamma^2 eps / s^4

and reach the prior, the gain and the observation, and through it ``x``:

    d v_prior = d R = (1 - q) g_v
    d m_prior = (1 - q) g_m - 2 k d g_v
    d q  = sum over groups and channels of  g_m d + g_v (S - v_prior + (1 - 2 q) d^2)
    dx = gamma / s dy + (q g_m + 2 k d g_v + 2 q g_v (x - x_bar)) / n

which is ``a dy + b x + c`` for each channel of a group. The affine map gets

    d gamma = sum dy (x - m) / s + 2 du gamma v / s^2        d beta = sum dy + d(output mean)

A gain that is learned is ``q = sigmoid(slope g + offset)``, with ``d g = slope q (1 - q) d q``; a process noise that is
learned is ``R = scale exp(r)``, with ``d r = R d R``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalmannorm.kernels import on_cpu, on_torch, operators
from kalmannorm.kernels.apply import alias, differentiable_gradients, is_transformed
from kalmannorm.kernels.backends import backend_for
from kalmannorm.kernels.memory import as_dense, dense
from kalmannorm.kernels.moments import moments
from kalmannorm.kernels.on_torch import fuse, gain_of, move_running, unbiased
from kalmannorm.kernels.options import Filter, Running
from kalmannorm.kernels.standardize import standardize

__all__ = ["Layer", "layer", "rectify_output"]


class Layer(NamedTuple):
    """What :func:`layer` returns."""

    output: Tensor
    """Shaped and typed as the input."""
    mean: Tensor
    """Of the belief that is handed on, ``(S, C, 1, ...)`` with the input's rank."""
    var: Tensor
    """Likewise."""
    statistics: Tensor
    """``(6, S, C)``, without a gradient: posterior mean and variance, the output's, the observed ones."""


def _plain(x: Tensor, other: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None, gain: Tensor | None,
           noise: Tensor | None, weight: Tensor | None, bias: Tensor | None, running: Running | None, options: Filter,
           posterior: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """The same by functions that autograd knows, for the gradient of a gradient and for torch.compile."""
    groups, channels = options.groups, x.shape[1]
    # Groups as channels of their own: (N / S, S C, *).
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    blocks = wide if groups == 1 else wide.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
    mean, var = (t.view(groups, channels) for t in moments(blocks))
    posterior_mean, posterior_var, q = fuse(mean, var, prior_mean, prior_var, gain, noise, options)
    ones = torch.ones_like(mean)
    gamma, beta = (ones if weight is None else weight * ones), (0 * ones if bias is None else bias * ones)
    flat_mean, flat_var, flat_gamma, flat_beta = (t.reshape(-1) for t in (posterior_mean, posterior_var, gamma, beta))
    y = standardize(blocks, flat_mean, flat_var, flat_gamma, flat_beta, options.eps)
    y = (y if groups == 1 else y.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)).to(x.dtype)
    y = y if other is None else y + other
    y = y.relu() if options.relu else y
    output_var = gamma.square() * (posterior_var / (posterior_var + options.eps))
    if running is not None:
        count = x.numel() // (groups * channels)
        move_running(running, posterior_mean.detach(), unbiased(posterior_var, q, var, count).detach())
    shape = (groups, channels, *[1] * (x.ndim - 2))
    carried = (posterior_mean, posterior_var) if posterior else (beta, output_var)
    rows = [t.detach() for t in (posterior_mean, posterior_var, beta, output_var, mean, var)]
    return (y, *(t.view(shape) for t in carried), torch.stack(rows))


def _compiled(x: Tensor, other: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None, gain: Tensor | None,
              noise: Tensor | None, weight: Tensor | None, bias: Tensor | None, running: Running | None,
              options: Filter, posterior: bool) -> Layer:  # fmt: skip
    y, statistics = operators.layer(x, other, prior_mean, prior_var, gain, noise, weight, bias, *options)
    if running is not None:
        seen = statistics.detach()
        q = 1.0 if prior_mean is None else gain_of(gain, prior_mean, options).detach()
        count = x.numel() // (options.groups * x.shape[1])
        move_running(running, seen[0], unbiased(seen[1], q, seen[5], count))
    rows = statistics.view(6, options.groups, x.shape[1], *[1] * (x.ndim - 2)).unbind(0)
    first = 0 if posterior else 2
    return Layer(alias(y), rows[first], rows[first + 1], statistics.detach())


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None,  # type: ignore[override]
                gain: Tensor | None, noise: Tensor | None, weight: Tensor | None, bias: Tensor | None,
                running: Running | None, options: Filter, posterior: bool, backend: ModuleType) -> Any:  # fmt: skip
        y, statistics = backend.layer_forward(
            x, other, prior_mean, prior_var, gain, noise, weight, bias, running, options
        )
        has_mask = other is not None and options.relu
        ctx.save_for_backward(
            x, other, prior_mean, prior_var, gain, noise, weight, bias, y if has_mask else None, statistics
        )
        ctx.options, ctx.posterior, ctx.backend = options, posterior, backend
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        rows = statistics.view(6, options.groups, x.shape[1], *[1] * (x.ndim - 2))
        first = 0 if posterior else 2
        return y, rows[first], rows[first + 1], statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_mean: Tensor | None, d_var: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        x, other, *parameters, y, statistics = ctx.saved_tensors  # once: a checkpoint allows no more
        if torch.is_grad_enabled():
            inputs = (x, other, *parameters, None, ctx.options, ctx.posterior)
            return (*differentiable_gradients(_plain, inputs, (dy, d_mean, d_var)), None)
        dy = torch.zeros_like(x) if dy is None else dy
        above = (d_mean, d_var, None, None) if ctx.posterior else (None, None, d_mean, d_var)
        dx, d_other, *rest = ctx.backend.layer_backward(dy, x, y, *parameters, statistics, *above, ctx.options)
        if other is not None and y is None:
            d_other = dy
        return (dx, d_other, *rest, None, None, None, None)


def _is_of_layer(node: Any) -> bool:
    return type(node) is _Layer._backward_cls  # type: ignore[attr-defined]


def rectify_output(y: Tensor) -> bool:
    """Rectify a layer's output in place, and let the layer's own backward pass undo that: it sees the mask anyway.

    Saves the pass over the activation that a ReLU's backward is. Only for an output that nothing was computed from yet.

    Args:
        y: the output, with a gradient that nobody asked to see.

    Returns:
        Whether it was done. Not where the layer's backend would have to compute the mask by a pass of its own.
    """
    node: Any = y.grad_fn
    if not _is_of_layer(node) or y.output_nr != 0 or y._version != 0:
        return False
    if node.backend is on_torch or node.options.relu or y._backward_hooks or y.retains_grad:
        return False
    y.detach().relu_()  # the same memory, and the same count of changes
    node.options = node.options._replace(relu=True)
    return True


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype is dtype else t.to(dtype)


def _check_sizes(x: Tensor, other: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None,
                 noise: Tensor | None, weight: Tensor | None, bias: Tensor | None, running: Running | None,
                 groups: int) -> None:  # fmt: skip
    channels = x.shape[1]
    if x.shape[0] % groups:
        raise ValueError(f"got a batch of {x.shape[0]}, expected a multiple of the {groups} statistic groups")
    if other is not None and other.shape != x.shape:
        raise ValueError(f"got a residual of shape {tuple(other.shape)}, expected {tuple(x.shape)}, the input's")
    of_channels = [("process_noise", noise), ("weight", weight), ("bias", bias)]
    if running is not None:
        of_channels += [("running_mean", running.mean), ("running_var", running.var)]
    for name, t in of_channels:
        if t is not None and (t.ndim != 1 or t.shape[0] != channels):
            raise ValueError(f"got {name} of shape {tuple(t.shape)}, expected ({channels},), one a channel")
    for name, t in (("mean", prior_mean), ("variance", prior_var)):
        if t is not None and (t.ndim < 2 or t.shape[1] != channels or t.shape[0] not in (1, groups)
                              or t.numel() != t.shape[0] * channels):  # fmt: skip
            raise ValueError(
                f"got a prior {name} of shape {tuple(t.shape)}, expected ({groups}, {channels}) or (1, {channels}): "
                "one a statistic group and channel of the input"
            )


def layer(x: Tensor, prior_mean: Tensor | None, prior_var: Tensor | None, gain: Tensor | None, noise: Tensor | None,
          weight: Tensor | None, bias: Tensor | None, options: Filter, *, other: Tensor | None = None,
          running: Running | None = None, posterior: bool = False) -> Layer:  # fmt: skip
    """Normalize by each group's statistics, fused with a prior.

    Args:
        x: ``(N, C, *)``, not empty.
        prior_mean: ``(S, C)`` or ``(1, C)``, perhaps with axes of size 1 behind; None without a
            prior.
        prior_var: likewise, without process noise.
        gain: ``(1,)`` or None, see ``options``.
        noise: ``(C,)`` or None.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        options: number of groups, gain, noise and the rest, see :class:`~kalmannorm.kernels.options.Filter`.
        other: added to the normalized activation, shaped and typed as ``x``.
        running: running statistics to move along in place.
        posterior: hand on the posterior of the input, not what is believed of the output.

    Raises:
        ValueError: for a tensor of another size. A compiled kernel would read and write whatever lies behind it.
    """
    _check_sizes(x, other, prior_mean, prior_var, noise, weight, bias, running, options.groups)
    dtype = torch.promote_types(x.dtype, torch.float32)
    prior_mean, prior_var, gain = _to(prior_mean, dtype), _to(prior_var, dtype), _to(gain, dtype)
    noise, weight, bias = _to(noise, dtype), _to(weight, dtype), _to(bias, dtype)
    compiled = torch.compiler.is_compiling() and x.device.type == "cpu" and on_cpu.is_available()
    compiled = compiled and not torch.compiler.is_exporting()  # to ONNX, for one, which has torch's functions only
    if is_transformed() and not compiled:
        return Layer(*_plain(x, other, prior_mean, prior_var, gain, noise, weight, bias, running, options, posterior))
    x = as_dense(x)
    other = None if other is None else dense(other, x)
    if prior_mean is not None and prior_var is not None:
        prior_mean, prior_var = prior_mean.contiguous(), prior_var.contiguous()
    if compiled:
        return _compiled(x, other, prior_mean, prior_var, gain, noise, weight, bias, running, options, posterior)
    buffers = () if running is None else (running.mean, running.var)
    backend = backend_for(x, prior_mean, prior_var, gain, noise, weight, bias, *buffers)
    for counter in () if running is None else (running.batches, running.nonfinite):
        if counter.dtype is not torch.int64 or counter.device != x.device:  # compiled kernels count in place
            backend = on_torch
    return Layer(*_Layer.apply(  # type: ignore[no-untyped-call]
        x, other, prior_mean, prior_var, gain, noise, weight, bias, running, options, posterior, backend
    ))  # fmt: skip
