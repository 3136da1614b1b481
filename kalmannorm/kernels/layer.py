"""The whole layer in one step: observe, fuse with the prior, normalize; perhaps rectify.

With ``q`` the gain, ``n`` the elements a channel of a group, ``d = x_bar - m_prior``, ``v_prior`` with its process
noise ``R``, and ``k = q (1 - q)`` where the spread of the two means counts (else 0):

    m = m_prior + q d
    v = v_prior + q (S - v_prior) + k d^2
    y = gamma (x - m) / s + beta                     s = sqrt(v + eps)

and the output is believed to have mean ``beta`` and variance ``u = gamma^2 v / s^2``.

Backward, the gradients of the posterior sum those that come through ``y`` and those from the layers above, ``dm`` and
``dv``; ``du`` is that of the output's variance:

    g_m = dm - gamma / s sum dy
    g_v = dv - gamma / (2 s^2) sum dy (x - m) / s + du gamma^2 eps / s^4

and reach the prior, the gain and the observation, and through it ``x``:

    d v_prior = d R = (1 - q) g_v
    d m_prior = (1 - q) g_m - 2 k d g_v
    d q  = sum over groups and channels of  g_m d + g_v (S - v_prior + (1 - 2 q) d^2)
    dx = gamma / s dy + (q g_m + 2 k d g_v + 2 q g_v (x - x_bar)) / n

which is ``a dy + b x + c`` for each channel of a group. The affine map gets

    d gamma = sum dy (x - m) / s + 2 du gamma v / s^2        d beta = sum dy + d(output mean)

A gain that is learned is ``q = sigmoid(slope g + offset)``, with ``d g = slope q (1 - q) d q``. A process noise that is
learned is a share of the predicted variance ``p``, so that a layer acts alike on an input of any scale, as BatchNorm
does: ``R = scale exp(r) p``, with ``d r = R d R`` and ``d p = (1 + scale exp(r)) d R``. Where the prior is corrected,
``m_prior + shift`` and ``factor (p + R)`` stand for its mean and variance.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian
from kalmannorm.kernels import on_cpu, on_torch, operators
from kalmannorm.kernels.arguments import Given, Options, Running
from kalmannorm.kernels.autograd import (
    alias,
    differentiable_gradients,
    is_exporting,
    is_transformed,
    needs_torchs_functions,
)
from kalmannorm.kernels.backends import backend_for
from kalmannorm.kernels.formulas import at_least_float32, carried, gain_of, move_running, to_groups
from kalmannorm.kernels.memory_format import as_dense


class Layer(NamedTuple):
    """The results of :func:`layer`."""

    output: Tensor  # shaped and typed as the input
    belief: Tensor  # mean and variance for the next layer: see :func:`~kalmannorm.kernels.formulas.carried`
    statistics: Tensor  # those of :func:`~kalmannorm.kernels.formulas.layer_forward`, without a gradient


def _plain(x: Tensor, given: Given, posterior: bool, options: Options, running: Running | None) -> Layer:
    """In differentiable functions: for second derivatives, transforms, and where a compiler cannot use the operator."""
    y, statistics = on_torch.layer_forward(at_least_float32(x), given, running, options)
    return Layer(y.to(x.dtype), carried(statistics, x, posterior), statistics.detach())


def _compiled(x: Tensor, given: Given, posterior: bool, options: Options, running: Running | None) -> Layer:
    """By an operator that torch.compile keeps whole."""
    y, belief, statistics = operators.layer(x, *given, posterior, *options)
    if running is not None:
        count = x.numel() // (options.groups * x.shape[1])
        move_running(running, Gaussian(statistics[0], statistics[1]), gain_of(given, options), statistics[5], count)
    return Layer(alias(y), alias(belief), statistics.detach())


class _Call(NamedTuple):
    """The arguments of :class:`_Layer` that are no tensors."""

    backend: ModuleType
    posterior: bool
    options: Options
    running: Running | None


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *vectors: Tensor | None) -> Any:  # type: ignore[override]
        y, statistics = call.backend.layer_forward(x, Given(*vectors), call.running, call.options)
        ctx.save_for_backward(x, *vectors, statistics)
        ctx.call = call
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, carried(statistics, x, call.posterior), statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_belief: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        x, *vectors, statistics = ctx.saved_tensors  # once: a checkpoint allows no more
        backend, posterior, options, _ = ctx.call
        if needs_torchs_functions(dy, d_belief):

            def plain(x: Tensor, *vectors: Tensor | None) -> Any:
                return _plain(x, Given(*vectors), posterior, options, None)

            return None, *differentiable_gradients(plain, (x, *vectors), (dy, d_belief))
        dy = torch.zeros_like(x) if dy is None else dy
        d_belief = None if d_belief is None else to_groups(d_belief, options.groups, posterior)
        dx, d_prior, *rest = backend.layer_backward(dy, x, Given(*vectors), statistics, d_belief, posterior, options)
        return None, dx, d_prior, None, None, *rest


def rectify_output(y: Tensor) -> bool:
    """Rectify a layer's output in place and apply the mask in the layer's backward pass, if possible; say if it was.

    This saves a ReLU's backward pass. Nothing else may have been computed from the output yet. Hooks on its gradient
    forbid it, and a backend that needs a pass of its own for the mask.
    """
    if type(y.grad_fn) is not _Layer._backward_cls or y.output_nr != 0 or y._version != 0:  # type: ignore[attr-defined]
        return False
    node: Any = y.grad_fn
    call = node.call
    if call.backend is on_torch or call.options.relu or y._backward_hooks or y.retains_grad:
        return False
    y.detach().relu_()  # the same memory, and the same count of changes
    node.call = call._replace(options=call.options.with_relu())
    return True


def _check_sizes(x: Tensor, given: Given, running: Running | None, groups: int) -> None:
    samples, channels, *_ = x.shape
    if samples % groups:
        raise ValueError(f"got a batch of {samples}, expected a multiple of the {groups} statistic groups")
    prior, shift, scale, _, noise, weight, bias = given
    moved = (None, None) if running is None else (running.mean, running.var)
    for place, t in enumerate((shift, scale, noise, weight, bias, *moved)):
        if t is not None and t.shape != (channels,):
            names = ("prior_shift", "prior_scale", "process_noise", "weight", "bias", "running_mean", "running_var")
            raise ValueError(f"got {names[place]} of shape {tuple(t.shape)}, expected ({channels},), one a channel")
    if prior is not None:
        shape = prior.shape
        if (len(shape) < 3 or shape[0] != 2 or shape[1] not in (1, groups) or shape[2] != channels
                or shape.numel() != 2 * shape[1] * channels):  # fmt: skip
            raise ValueError(
                f"got a prior of shape {tuple(shape)}, expected (2, {groups}, {channels}) or (2, 1, {channels}): mean "
                "and variance of each statistic group and channel"
            )


def layer(x: Tensor, given: Given, options: Options, *, running: Running | None = None,
          posterior: bool = False) -> Layer:  # fmt: skip
    """Normalize ``(N, C, *)``, which is not empty, by each group's statistics, fused with a prior.

    Running statistics are moved in place. The belief is that of the output, or the ``posterior`` of the input. Sizes
    are checked: a compiled kernel would read and write beyond a tensor's end.
    """
    _check_sizes(x, given, running, options.groups)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if any([t is not None and t.dtype is not dtype for t in given]):
        given = Given(*[None if t is None else t.to(dtype) for t in given])
    if is_transformed():
        # An export, to ONNX for one, has torch's functions only.
        compiled = torch.compiler.is_compiling() and not is_exporting()
        compiled = compiled and x.device.type == "cpu" and on_cpu.is_available()
        return (_compiled if compiled else _plain)(x, given, posterior, options, running)
    x = as_dense(x)
    if given.prior is not None and not given.prior.is_contiguous():
        given = given._replace(prior=given.prior.contiguous())
    backend = backend_for(x, *given, *(() if running is None else running[:2]))
    if running is not None and any([t.dtype is not torch.int64 or t.device != x.device for t in running[2:4]]):
        backend = on_torch  # a compiled kernel could not count
    call = _Call(backend, posterior, options.for_kernels(), running)
    return Layer(*_Layer.apply(call, x, *given))  # type: ignore[no-untyped-call]
