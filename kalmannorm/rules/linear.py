"""Convolutions and linear maps: both moments in closed form.

Every rule here assumes that the elements an output is summed from are independent, as the paper's
draws do. Border padding is ignored: the belief is that of an output whose whole window lies inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.kernels import link
from kalmannorm.rules.pointwise import Rectified
from kalmannorm.rules.table import Belief, aliases, rule

_ACTIVATION_AS_WEIGHT = Unknown("the weight is computed from the input")
_NO_BATCH = Unknown("a convolution without a batch axis")


def _convolve(x: Gaussian, weight: Tensor, bias: Tensor | None, groups: int, spatial: int) -> Belief:
    if isinstance(weight, Gaussian) or isinstance(bias, Gaussian):
        return _ACTIVATION_AS_WEIGHT
    if x.ndim == spatial + 1:
        return _NO_BATCH
    if groups == 1:
        return through_weight(x, weight, bias)
    x = x.full([1]).pool(range(2, x.ndim))
    taps = weight.to(x.mean.dtype).flatten(2)
    mean = _by_blocks(x.mean.flatten(1), taps.sum(-1), groups)
    var = _by_blocks(x.var.flatten(1), taps.square().sum(-1), groups)
    if bias is not None:
        mean = mean + bias
    return Gaussian(mean, var).map(lambda t: t.reshape(*t.shape, *[1] * (x.ndim - 2)))


def through_weight(x: Gaussian, weight: Tensor, bias: Tensor | None) -> Gaussian:
    """Through a matrix or an ungrouped filter; through the ReLU before it in the same step, where there is one."""
    if isinstance(x, Rectified) and not x.is_known and x.below.is_per_channel(weight.shape[1]):
        below = x.below
        out = link(below.mean, below.var, weight, bias, relu=True)
        assert out.rectified_mean is not None
        assert out.rectified_var is not None
        x.keep(out.rectified_mean, out.rectified_var)
        return Gaussian(out.mean, out.var)
    if not x.is_per_channel(weight.shape[1]):
        x = x.full([1]).pool(range(2, x.ndim))
        x = Gaussian(*torch.broadcast_tensors(x.mean, x.var))
    out = link(x.mean, x.var, weight, bias)
    return Gaussian(out.mean, out.var)


def _by_blocks(moment: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """``(S, C_in)`` through a block-diagonal ``(C_out, C_in / groups)``: ``(S, C_out)``."""
    blocks: Tensor = moment.unflatten(1, (groups, 1, -1)) * matrix.unflatten(0, (groups, -1))
    return blocks.sum(-1).flatten(1)


@rule(*aliases("conv1d"))
def conv1d(x: Gaussian, weight: Tensor, bias: Tensor | None = None, stride: object = 1,
           padding: object = 0, dilation: object = 1, groups: int = 1) -> Belief:  # fmt: skip
    """``m' = sum_k W m + b`` and ``v' = sum_k W^2 v`` for ``x`` of ``(S, C, 1)``."""
    return _convolve(x, weight, bias, groups, 1)


@rule(*aliases("conv2d"))
def conv2d(x: Gaussian, weight: Tensor, bias: Tensor | None = None, stride: object = 1,
           padding: object = 0, dilation: object = 1, groups: int = 1) -> Belief:  # fmt: skip
    """``m' = sum_hw W m + b`` and ``v' = sum_hw W^2 v`` for ``x`` of ``(S, C, 1, 1)``."""
    return _convolve(x, weight, bias, groups, 2)


@rule(*aliases("conv3d"))
def conv3d(x: Gaussian, weight: Tensor, bias: Tensor | None = None, stride: object = 1,
           padding: object = 0, dilation: object = 1, groups: int = 1) -> Belief:  # fmt: skip
    """``m' = sum_dhw W m + b`` and ``v' = sum_dhw W^2 v`` for ``x`` of ``(S, C, 1, 1, 1)``."""
    return _convolve(x, weight, bias, groups, 3)


@rule(*aliases("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"))
def conv_transpose(x: Gaussian, weight: Tensor, bias: Tensor | None = None, stride: int | Sequence[int] = 1,
                   padding: object = 0, output_padding: object = 0, groups: int = 1,
                   dilation: int | Sequence[int] = 1) -> Belief:  # fmt: skip
    """A transposed convolution: the mixture over its phases.

    With stride ``s``, an output pixel meets only the taps ``k`` with ``k * dilation = phase`` modulo
    ``s``. The moments of each phase are those of a convolution by these taps; all phases are equally
    frequent, so the belief is their mixture.
    """
    if isinstance(weight, Gaussian) or isinstance(bias, Gaussian):
        return _ACTIVATION_AS_WEIGHT
    spatial = weight.ndim - 2
    if x.ndim == spatial + 1:
        return _NO_BATCH
    x = x.full([1]).pool(range(2, x.ndim))
    weight = weight.to(x.mean.dtype)
    strides = [stride] * spatial if isinstance(stride, int) else list(stride)
    dilations = [dilation] * spatial if isinstance(dilation, int) else list(dilation)
    taps, squares = weight, weight.square()
    for axis, (s, d) in enumerate(zip(strides * (spatial // len(strides)), dilations * (spatial // len(dilations)), strict=True)):  # noqa: E501
        phase_of_tap = (torch.arange(weight.shape[2 + axis], device=weight.device) * d) % s
        to_phase = F.one_hot(phase_of_tap, s).to(weight.dtype)
        taps, squares = (torch.tensordot(t, to_phase, dims=([2], [0])) for t in (taps, squares))
    phases = math.prod(taps.shape[2:])
    out_channels = weight.shape[1]

    def mix(moment: Tensor, kernel: Tensor) -> Tensor:
        """``(S, C_in)`` through ``(C_in, C_out / groups, *phases)``: ``(phases, S, C_out)``."""
        kernel = kernel.reshape(groups, -1, out_channels, phases)
        moment = moment.flatten(1).unflatten(1, (groups, -1))
        return torch.einsum("sgi,giop->psgo", moment, kernel).flatten(2)

    each_phase = Gaussian(mix(x.mean, taps), mix(x.var, squares))
    out = each_phase.pool([0]).map(lambda t: t.squeeze(0))
    mean = out.mean if bias is None else out.mean + bias
    return Gaussian(mean, out.var).map(lambda t: t.reshape(*t.shape, *[1] * (x.ndim - 2)))


@rule(*aliases("linear"))
def linear(x: Gaussian, weight: Tensor, bias: Tensor | None = None) -> Belief:
    """``m' = W m + b`` and ``v' = W^2 v`` along the last axis, whatever stands before it."""
    if isinstance(weight, Gaussian) or isinstance(bias, Gaussian):
        return _ACTIVATION_AS_WEIGHT
    if weight.ndim == 1:  # one output feature, whose axis is dropped
        return linear(x, weight[None], bias).map(lambda t: t.squeeze(-1))  # type: ignore[union-attr]
    if x.ndim == 2:
        return through_weight(x, weight, bias)
    if x.ndim == 1:
        one = linear(x.full([0]).map(lambda t: t[None]), weight, bias)
        return one.map(lambda t: t.squeeze(0))  # type: ignore[union-attr]
    x = x.full([x.ndim - 1])
    before = torch.broadcast_shapes(x.mean.shape, x.var.shape)[:-1]
    flat = x.map(lambda t: t.expand(*before, -1).flatten(0, -2))
    out = link(flat.mean, flat.var, weight, bias)
    return Gaussian(out.mean, out.var).map(lambda t: t.unflatten(0, before))
