"""Convolutions and linear maps: both moments in closed form.

Every rule here takes the terms that an output sums as independent, as the paper's draws do. It ignores
padding: the belief is that of an output whose whole window lies inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Packed, Unknown
from kalmannorm.kernels.formulas import at_least_float32
from kalmannorm.kernels.link import link
from kalmannorm.rules.rectified import Rectified
from kalmannorm.rules.shape import in_one_shape, per_axis
from kalmannorm.rules.table import BELIEF_ALONE, SOURCES, Belief, aliases, belief_rule, rule

_NO_BATCH = Unknown("a convolution without a batch axis")


def _through_filter(x: Gaussian, weight: Tensor, bias: Tensor | None) -> Gaussian:
    """Through a matrix or an ungrouped filter, in one step with a ReLU before it."""
    if not x.is_per_channel(weight.shape[1]):
        x = in_one_shape(x.full([1]).pool(range(2, x.ndim)))
    rectified = x if isinstance(x, Rectified) and not x.is_known else None
    below = x if rectified is None else rectified.below
    moments, after = link(below.packed().moments, weight, bias, relu=rectified is not None)
    if rectified is not None and after is not None:
        rectified.keep(Packed(after))
    return Packed(moments)


def _by_blocks(moment: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """``(S, C_in)`` through a block-diagonal ``(C_out, C_in / groups)``: ``(S, C_out)``."""
    blocks: Tensor = moment.unflatten(1, (groups, 1, -1)) * matrix.unflatten(0, (groups, -1))
    return blocks.sum(-1).flatten(1)


def _of_pixels(mean: Tensor, var: Tensor, bias: Gaussian | Tensor | None, spatial: int) -> Gaussian:
    """``(S, C_out)`` and a bias to ``(S, C_out, 1, ...)``."""
    if isinstance(bias, Gaussian):
        mean, var = mean + bias.mean, var + bias.var
    elif bias is not None:
        mean = mean + bias
    return Gaussian(mean, var).map(lambda t: t.reshape(*t.shape, *[1] * spatial))


@rule(*aliases("conv1d", "conv2d", "conv3d"), belief_first=True)
def conv(x: Gaussian, weight: Gaussian | Tensor, bias: Gaussian | Tensor | None = None, stride: object = 1,
         padding: object = 0, dilation: object = 1, groups: int = 1) -> Belief:  # fmt: skip
    """``m' = sum W m + b`` and ``v' = sum W^2 v`` over input channels and taps, for ``x`` of ``(S, C, 1, ...)``.

    A filter that is computed from the input, of mean ``W`` and variance ``U``, counts as independent of ``x``:
    ``v' = sum (W^2 + U) v + U m^2``.
    """
    if x.ndim == weight.ndim - 1:
        return _NO_BATCH
    if groups == 1 and not isinstance(weight, Gaussian) and not isinstance(bias, Gaussian):
        return _through_filter(x, weight, bias)
    x = x.full([1]).pool(range(2, x.ndim))
    filters = weight.full(range(weight.ndim)) if isinstance(weight, Gaussian) else None
    taps = (weight if filters is None else filters.mean).to(x.mean.dtype).flatten(2)  # type: ignore[union-attr]
    mean = _by_blocks(x.mean.flatten(1), taps.sum(-1), groups)
    var = _by_blocks(x.var.flatten(1), taps.square().sum(-1), groups)
    if filters is not None:
        var = var + _by_blocks((x.var + x.mean.square()).flatten(1), filters.var.flatten(2).sum(-1), groups)
    return _of_pixels(mean, var, bias, x.ndim - 2)


@belief_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(x: Gaussian, weight: Tensor, bias: Tensor | None = None, stride: int | Sequence[int] = 1,
                   padding: object = 0, output_padding: object = 0, groups: int = 1,
                   dilation: int | Sequence[int] = 1) -> Belief:  # fmt: skip
    """A transposed convolution: the mixture over its phases.

    With stride ``s``, an output pixel meets only the taps ``k`` with ``k * dilation = phase`` modulo
    ``s``. The moments of each phase are those of a convolution by these taps; all phases are equally
    frequent, so the belief is their mixture.
    """
    spatial = weight.ndim - 2
    if x.ndim == spatial + 1:
        return _NO_BATCH
    x = x.full([1]).pool(range(2, x.ndim))
    taps = weight.to(x.mean.dtype)
    squares = taps.square()
    for axis, (s, d) in enumerate(zip(per_axis(stride, spatial), per_axis(dilation, spatial), strict=True)):
        phase_of_tap = (torch.arange(weight.shape[2 + axis], device=weight.device) * d) % s
        to_phase = (phase_of_tap[:, None] == torch.arange(s, device=weight.device)).to(taps.dtype)
        taps, squares = (torch.tensordot(t, to_phase, dims=([2], [0])) for t in (taps, squares))
    phases = math.prod(taps.shape[2:])

    def mix(moment: Tensor, kernel: Tensor) -> Tensor:
        """``(S, C_in)`` through ``(C_in, C_out / groups, *phases)``: ``(phases, S, C_out)``."""
        kernel = kernel.reshape(groups, -1, weight.shape[1], phases)
        moment = moment.flatten(1).unflatten(1, (groups, -1))
        return torch.einsum("sgi,giop->psgo", moment, kernel).flatten(2)

    out = Gaussian(mix(x.mean, taps), mix(x.var, squares)).pool([0]).map(lambda t: t.squeeze(0))
    return _of_pixels(out.mean, out.var, bias, spatial)


def through_matrix(x: Gaussian, weight: Tensor, bias: Tensor | None = None) -> Gaussian:
    """``m' = W m + b`` and ``v' = W^2 v`` along the last axis, for every position along the other axes."""
    if x.ndim == 2:
        return _through_filter(x, weight, bias)
    x = x.full([x.ndim - 1])
    before = torch.broadcast_shapes(x.mean.shape, x.var.shape)[:-1]
    flat = x.map(lambda t: t.expand(*before, -1).reshape(math.prod(before), -1))
    return Packed(link(flat.packed().moments, weight, bias)[0]).map(lambda t: t.reshape(*before, -1))


@belief_rule("linear")
def linear(x: Gaussian, weight: Tensor, bias: Tensor | None = None) -> Gaussian:
    """``m' = W m + b`` and ``v' = W^2 v`` along the last axis; see :func:`through_matrix`."""
    if weight.ndim == 1:  # a single output, without an axis of its own
        return through_matrix(x, weight[None], bias).map(lambda t: t.squeeze(-1))
    return through_matrix(x, weight, bias)


@rule(F.embedding)
def embedding(index: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Gaussian:
    """Rows of a table, each as likely as the others: mean and variance of its columns."""
    var, mean = torch.var_mean(at_least_float32(weight), 0, correction=0)
    return Gaussian(mean, var).map(lambda t: t.view(*[1] * index.ndim, -1))


SOURCES.add(F.embedding)
BELIEF_ALONE.add(embedding)
