"""Convolutions and linear maps: both moments in closed form.

Every rule here assumes that the elements an output is summed from are independent, as the paper's
draws do. Border padding is ignored: the belief is that of an output whose whole window lies inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Packed, Unknown
from kalmannorm.kernels.layer import Through
from kalmannorm.kernels.link import link
from kalmannorm.rules.pointwise import Deferred, Rectified
from kalmannorm.rules.table import DEFERRING, SOURCES, Belief, aliases, rule

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


class Linked(Deferred):
    """A belief that came through a matrix or an ungrouped filter, rectified before or not.

    Mostly a normalization layer comes next, which computes it along with its own: see :meth:`link`.

    Args:
        below: one value a statistic group and channel.
        filter: ``(C_out, C_in, *taps)``.
        bias: ``(C_out,)`` or None.
    """

    __slots__ = ("bias", "filter")

    def __init__(self, below: Gaussian, filter: Tensor, bias: Tensor | None) -> None:
        super().__init__(below)
        self.filter = filter
        self.bias = bias

    def _of(self, below: Gaussian) -> Deferred:
        return Linked(below, self.filter, self.bias)

    def _rectified(self) -> Rectified | None:
        """The ReLU below, if it is to be computed along with this."""
        below = self.below
        return below if type(below) is Rectified and not below.is_known else None

    def _compute(self) -> Gaussian:
        rectified = self._rectified()
        below = self.below if rectified is None else rectified.below
        moments, after = link(below.packed().moments, self.filter, self.bias, relu=rectified is not None)
        if rectified is not None and after is not None:
            rectified.keep(Packed(after))
        return Packed(moments)

    def link(self) -> tuple[Gaussian, Through | None]:
        """The belief below, and what leads from there to this one; itself and None where the moments are known.

        Who computes them takes over to :meth:`keep` those of a ReLU below.
        """
        if self._grad != torch.is_grad_enabled() or self.is_known:
            return self, None
        rectified = self._rectified()
        below = self.below if rectified is None else rectified.below
        return below, Through(self.filter, self.bias, rectified is not None)

    def is_per_channel(self, channels: int) -> bool:
        """As :class:`Gaussian`'s; nothing is computed."""
        return self.filter.shape[0] == channels


def through_weight(x: Gaussian, weight: Tensor, bias: Tensor | None) -> Gaussian:
    """Through a matrix or an ungrouped filter; through the ReLU before it in the same step, where there is one."""
    known = x.below if type(x) is Rectified and not x.is_known else x
    if not known.is_per_channel(weight.shape[1]):
        x = x.full([1]).pool(range(2, x.ndim))
        x = Gaussian(*torch.broadcast_tensors(x.mean, x.var))
    return Linked(x, weight, bias)


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
    moments, _ = link(flat.packed().moments, weight, bias)
    return Packed(moments).map(lambda t: t.unflatten(0, before))


@rule(F.embedding)
def embedding(index: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Belief:
    """Rows of a table, each as likely as the others: mean and variance of its columns."""
    if isinstance(index, Gaussian) or isinstance(weight, Gaussian):
        return _ACTIVATION_AS_WEIGHT
    table = weight.to(torch.promote_types(weight.dtype, torch.float32))
    var, mean = torch.var_mean(table, 0, correction=0)
    return Gaussian(mean, var).map(lambda t: t.view(*[1] * index.ndim, -1))


SOURCES.add(F.embedding)


def _only_notes(x: Gaussian, weight: Any, bias: object = None, stride: object = 1, padding: object = 0,
                dilation: object = 1, groups: int = 1) -> bool:  # fmt: skip
    return groups == 1 and isinstance(weight, Tensor) and x.ndim == weight.ndim and x.is_per_channel(weight.shape[1])


DEFERRING.update(dict.fromkeys((conv1d, conv2d, conv3d, linear), _only_notes))
